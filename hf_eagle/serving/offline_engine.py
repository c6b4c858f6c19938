"""Run a vLLM engine that decodes the prompts of each line on standard input; `serving.speed.Engine` starts it.

    python offline_engine.py '{"model": TARGET, "speculative_config": {...}, ...}'

It imports only the standard library and vLLM, since it runs in the server's environment. Its argument is a JSON object
of arguments of `vllm.LLM`. Every line of standard input is one run, `{"prompts": [...], "in_flight": 4, "max_tokens":
64}`. A prompt is a list of token ids, or a chat with pictures as `served_prompts.py` writes it. Every line of standard
output is the result of a run, see `decode`, after a first line, `"ready"`.
"""

import json
import os
import sys
import time


# vLLM reads these when it is imported. The engine runs in this process, since a second one would wait busily on a core
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "accepted_per_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}


def main() -> None:
    """Start the engine, then decode one run per line."""
    # vLLM prints to standard output too: from here on that is standard error, and only results go to the real one
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    llm = LLM(**json.loads(sys.argv[1]), disable_log_stats=False, enable_prefix_caching=False)
    print(json.dumps("ready"), file=results, flush=True)
    for line in sys.stdin:
        run = json.loads(line)
        sampling = SamplingParams(temperature=0.0, max_tokens=run["max_tokens"])
        print(json.dumps(decode(llm, run["prompts"], sampling, run["in_flight"])), file=results, flush=True)


def decode(llm, prompts: list[list[int] | dict], sampling, in_flight: int) -> dict:
    """Decode all prompts, at most `in_flight` at a time.

    Returns:
        `seconds` of the whole run, reading the prompts included; `token_ids`, one list per prompt; and vLLM's counts in
        this run, under the names of `COUNTERS` (zero without a draft).
    """
    answers, index_of, begun = {}, {}, 0
    before, started = counters(llm), time.perf_counter()

    while len(answers) < len(prompts):
        while begun < len(prompts) and begun - len(answers) < in_flight:
            for request_id in add_request(llm, prompts[begun], f"prompt {begun}", sampling):
                index_of[request_id] = begun
            begun += 1

        for output in llm.llm_engine.step():
            if output.finished:
                answers[index_of[output.request_id]] = list(output.outputs[0].token_ids)

    seconds = time.perf_counter() - started
    counted = {name: minus(value, before[name]) for name, value in counters(llm).items()}
    return {"seconds": seconds, "token_ids": [answers[index] for index in range(len(prompts))], **counted}


def add_request(llm, prompt: list[int] | dict, name: str, sampling) -> tuple[str, ...]:
    """Add a prompt to the engine, and return the request ids under which its output may come."""
    if isinstance(prompt, list):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return (name,)

    # vLLM names chats itself, and adds random letters to that id for its own use: the output may come without them
    options = {"tools": prompt["tools"], "chat_template_kwargs": prompt["chat_template_kwargs"]}
    (request_id,) = llm.enqueue_chat([prompt["messages"]], sampling, use_tqdm=False, **options)
    return request_id, request_id.rpartition("-")[0]


def counters(llm) -> dict:
    """Return vLLM's counts since the engine started, under the names of `COUNTERS`; a vector is a list."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    counts = {}
    for name, counter in COUNTERS.items():
        metric = metrics.get(counter)
        if metric is None:  # without a draft, or not counted yet
            counts[name] = 0
        else:
            counts[name] = list(metric.values) if hasattr(metric, "values") else metric.value
    return counts


def minus(now, before):
    """Return how much a counter, or a vector of counters, has grown."""
    if isinstance(now, list):
        # `before` is 0 for a vector that vLLM had not started yet
        return [a - b for a, b in zip(now, before or [0] * len(now), strict=True)]
    return now - before


if __name__ == "__main__":
    main()
