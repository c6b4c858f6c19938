"""vLLM's own offline `LLM.chat` on given chats, as often as it is told: run by scripts/dev/benchmark_regeneration.py.

    python offline_chat.py '{"chats": FILE, "max_tokens": 128, "engine": {"model": TARGET, ...}}'

Standard library and vLLM only, since it runs in the server's environment. Every line of standard input is one run over
all chats, every line it prints to standard output is its seconds and tokens.
"""

import json
import os
import sys
import time


def main() -> None:
    """For each line that comes in, answer the chats once more and write a line of JSON: seconds and tokens."""
    settings = json.loads(sys.argv[1])
    # vLLM prints, too, and so does its engine, a process of its own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams

    with open(settings["chats"], encoding="utf-8") as file:
        chats = json.load(file)
    llm = LLM(**settings["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=settings["max_tokens"])
    llm.chat(chats[:2], sampling, use_tqdm=False)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        outputs = llm.chat(chats, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begun
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
