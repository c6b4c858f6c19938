"""A real vLLM that decodes given prompts, once a request; `serving.speed.Engine` runs it.

    python offline_engine.py '{"model": TARGET, "speculative_config": {...}, ...}'

It imports only the standard library and vLLM, since it runs in the server's environment. The argument holds the
engine's arguments. Every line of standard input is one run, `{"prompts": [...], "in_flight": 4, "max_tokens": 64}`. A
prompt is a list of token ids, or a chat with pictures, see `served_prompts`. Every line of standard output is a result,
see `decode`.
"""

import json
import os
import sys
import time


# vLLM reads these when it is imported; one process an engine, so that no other process spins
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "accepted_per_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def main() -> None:
    """Start the engine and answer line by line."""
    # vLLM prints to standard output too: give it standard error, and keep the real one for answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(sys.argv[1]), disable_log_stats=False, enable_prefix_caching=False)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        sampling = SamplingParams(temperature=0.0, max_tokens=run["max_tokens"])
        print(json.dumps(decode(llm, run["prompts"], sampling, run["in_flight"])), file=answers, flush=True)


def decode(llm, prompts: list[list[int] | dict], sampling, in_flight: int) -> dict:
    """Answer all prompts, never more than `in_flight` at a time.

    Returns:
        `seconds`, prompts included; `token_ids`, one list an answer; and what vLLM counted in this run, under the names
        of `COUNTERS` (zero without a draft).
    """
    answers, places, begun = {}, {}, 0
    before, started = counters(llm), time.perf_counter()

    while len(answers) < len(prompts):
        while begun < len(prompts) and begun - len(answers) < in_flight:
            places |= dict.fromkeys(add_request(llm, prompts[begun], f"prompt {begun}", sampling), begun)
            begun += 1
        for output in llm.llm_engine.step():
            if output.finished:
                answers[places[output.request_id]] = list(output.outputs[0].token_ids)

    seconds = time.perf_counter() - started
    found = {name: minus(value, before[name]) for name, value in counters(llm).items()}
    return {"seconds": seconds, "token_ids": [answers[index] for index in range(len(prompts))], **found}


def add_request(llm, prompt: list[int] | dict, name: str, sampling) -> tuple[str, ...]:
    """Puts a prompt into the engine; the names under which its output may come."""
    if isinstance(prompt, list):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return (name,)
    more = {"tools": prompt["tools"], "chat_template_kwargs": prompt["chat_template_kwargs"]}
    (inside,) = llm.enqueue_chat([prompt["messages"]], sampling, use_tqdm=False, **more)
    return inside, inside.rpartition("-")[0]  # vLLM adds letters to the name that it gives, for itself


def counters(llm) -> dict:
    """What vLLM has counted since it started, under the names of `COUNTERS`."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    found = {name: metrics.get(counter) for name, counter in COUNTERS.items()}
    return {
        name: 0 if metric is None else list(metric.values) if hasattr(metric, "values") else metric.value
        for name, metric in found.items()
    }


def minus(now, before):
    """How much a counter, or a vector of them, grew."""
    if isinstance(now, list):
        # a vector that vLLM had not started yet counts as zeros
        return [a - b for a, b in zip(now, before or [0] * len(now), strict=True)]
    return now - before


if __name__ == "__main__":
    main()
