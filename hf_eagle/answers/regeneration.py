"""Replace the answers in a data set by the target's answers, since a draft must learn to predict its target."""

import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..data.loss_mask import ConversationEncoder
from ..data.rendering import TemplateLimit, TemplateRefusal
from ..door.journal import Journal
from ..door.json_files import check_fields
from .answer import START_OVER, Answer, AnswerReader, add_answer, read_answer, said_answer
from .turns import check_arguments, context, open_journal, read_ids, read_offers, read_turns
from .written_answers import write_answered


logger = logging.getLogger(__name__)

# a batch: when it was answered, and `[record, answer]` of each of its prompts
_JOURNAL_ROW = {"turn": int, "batch": int, "answers": [list]}
_SAMPLE = 10  # first records to try: a template that refuses them all fits none
_WINDOW = 16  # batches whose prompts are sorted by length together: little padding, and no batch waits for all prompts


def regenerate_answers(
    model,
    tokenizer,
    records,
    output_path: str | Path,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    time_limit: float | None = None,
    progress: bool = True,
    template_kwargs: dict | None = None,
) -> Path:
    """Answer the user turns of `records` with `model`, in order, and write one JSON line per record.

    The answers of a record are dropped; the rest is answered turn by turn, and each turn sees the model's own earlier
    answers. All first turns are answered before the second ones. A line is `{"id": the record's own or its index,
    "messages": [...], "finish_reason": ["stop" or "length", ...], "answer_token_ids": [...], "prompt_tokens": [...]}`,
    with `tools` where some are offered; lines are in the order of the records. Training on a line uses exactly these
    token ids after their prompt. A record takes several lines if a later prompt does not repeat an earlier answer
    exactly: see `write_answered`. An answer that calls a tool ends its record. So does a blank answer, which does not
    count as one. A record without any answer is counted, but not written.

    Finished batches go to `<output_path>.journal`. After an interruption the next call continues from there. Its output
    does not depend on the interruption, since a batch has the same rows and, when sampling, the same seed.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: the target's tokenizer, with its chat template.
        records (`datasets.Dataset` or list of dict): chat records of any form that `to_messages` reads.
        output_path (`str` or `Path`): file to write, completely or not at all.
        max_new_tokens (`int`, *optional*, defaults to 128): maximum number of tokens in an answer.
        batch_size (`int`, *optional*, defaults to 96): prompts answered together.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy.
        top_p (`float`, *optional*, defaults to 1.0): nucleus-sampling threshold, used if `temperature` is above 0.
        seed (`int`, *optional*, defaults to 0): base seed for the sampling and for the order of the batches.
        time_limit (`float`, *optional*): after this many seconds no new batch starts, but each call runs at least one.
            The file then holds the records answered so far, and the next call continues.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.
        template_kwargs (`dict`, *optional*): extra keyword arguments for the chat template, such as
            `{"enable_thinking": False}`; train with the same. `tools` are offered in every chat without its own.

    A record ends at a prompt that the chat template refuses; a warning counts these and gives the first reason.

    Returns the path. Raises a `ValueError` for a malformed record or one without a user turn, a template that refuses
    all of the first records or does not end, an argument out of range, and an `output_path` that holds something else
    or was begun with other settings; all before the first answer.
    """
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    check_arguments(counts, temperature, top_p, seed, time_limit)

    output_path = Path(output_path)
    turns, tools = read_turns(records), read_offers(records, template_kwargs)
    encoder = ConversationEncoder(tokenizer, None, template_kwargs)
    generate = _Generator(model, AnswerReader(tokenizer, template_kwargs), max_new_tokens, temperature, top_p)
    _check_prompts(generate, turns, tools)

    settings = {
        "target": str(getattr(model.config, "_name_or_path", "")),
        "dtype": str(model.dtype),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    # options and tools are part of the question: a run with different ones cannot continue this journal
    asked_with = [encoder.template, template_kwargs or {}, tools]
    with open_journal(output_path, turns, settings, asked_with) as journal:
        answers = _run(generate, turns, tools, journal, batch_size, seed, time_limit, progress)
    write_answered(output_path, turns, answers, tools, encoder, read_ids(records))
    return output_path


def _check_prompts(generate, turns: list, tools: list) -> None:
    """Raises a `ValueError` if the template refuses all of the first records, before anything is computed."""
    refused: dict[int, str] = {}
    for id, own in enumerate(turns[:_SAMPLE]):
        if generate.prompts([id], [own[0]], tools[id : id + 1], refused):
            return

    if refused:
        among = "" if len(refused) == len(turns) == 1 else f", as all of the first {len(refused)}"
        raise ValueError(f"The chat template of `target`'s tokenizer refuses record 0{among}: {refused[0]}.")


def _run(generate, turns, tools, journal, batch_size, seed, time_limit, progress) -> list[list[Answer | None]]:
    """Return the answers of each record; `None` ends a record whose next prompt is too long or refused, or that calls
    a tool."""
    answers = [[] for _ in turns]
    done = _batches_in(journal)

    started, fresh, tokens = time.monotonic(), 0, 0
    early: dict[int, str | None] = {}  # the template's reason, `None` for a prompt too long
    bar = tqdm(total=sum(map(len, turns)), unit="answer", desc="regenerating", disable=not progress)

    for turn in range(max(map(len, turns), default=0)):
        waiting = [id for id in range(len(turns)) if len(turns[id]) > turn and answers[id][-1:] != [None]]
        for number, prompts in _batches(generate, turns, tools, answers, waiting, batch_size, seed, early):
            ids = [id for id, _ in prompts]

            # answered before an interruption, or now
            said = done.get((turn, number))
            if said is None:
                if time_limit is not None and fresh and time.monotonic() - started > time_limit:
                    bar.close()
                    return answers
                before = [answers[id][-1] if answers[id] else None for id in ids]
                found = generate([prompt for _, prompt in prompts], before, seed + 1_000_003 * turn + number)
                tokens += sum(len(answer.token_ids) for answer in found)
                said = list(zip(ids, found, strict=True))
                rows = [[id, answer.as_row()] for id, answer in said]
                journal.append({"turn": turn, "batch": number, "answers": rows})
                fresh += 1
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)

            if [id for id, _ in said] != ids:  # an earlier version continued after empty answers
                raise ValueError(f"{journal.path} holds other records in batch {number} of turn {turn}; delete it.")
            for id, answer in said:
                add_answer(answers[id], answer, turns[id])
            bar.update(len(ids))
        bar.update(sum(len(turns[id]) - turn for id in waiting if id in early))
    bar.close()
    _log_early(early)
    return answers


def _batches_in(journal: Journal) -> dict[tuple[int, int], list[tuple[int, Answer]]]:
    """Return the answers of earlier runs, by turn and batch; raise `ValueError` for a row of another form."""
    batches = {}
    for row in journal.rows:
        check_fields(row, _JOURNAL_ROW, journal.path, START_OVER)
        said = []
        for pair in row["answers"]:
            named = dict(zip(("id", "answer"), pair, strict=False))
            check_fields(named, {"id": int, "answer": dict}, journal.path, START_OVER)
            said.append((named["id"], read_answer(named, journal.path)))
        batches[row["turn"], row["batch"]] = said
    return batches


def _log_early(early: dict[int, str | None]) -> None:
    """Log how many records end early, and why."""
    refused = {id: reason for id, reason in early.items() if reason is not None}
    if len(early) > len(refused):
        logger.warning(
            "%d records end early: with `max_new_tokens` their prompts exceed the target's length.",
            len(early) - len(refused),
        )
    if refused:
        first = min(refused)
        logger.warning(
            "%d records end early, since the chat template refuses them. First, record %d: %s",
            *(len(refused), first, refused[first]),
        )


def _batches(generate, turns, tools, answers, waiting, batch_size, seed, early) -> Iterator[tuple[int, list]]:
    """Yield `(number, [(id, prompt ids)])` of each batch, the same in every run.

    A record ends if its prompt is too long, or refused by the template: it goes to `early`, and `None` to its answers.
    """
    number = 0
    for begin in range(0, len(waiting), _WINDOW * batch_size):
        window, refused = waiting[begin : begin + _WINDOW * batch_size], {}
        chats = [context(turns[id], answers[id]) for id in window]
        prompts = generate.prompts(window, chats, [tools[id] for id in window], refused)
        early |= refused | {id: None for id, ids in prompts.items() if len(ids) > generate.longest_prompt}

        for id in window:
            if id in early:
                answers[id].append(None)

        fitting = sorted((len(ids), id, ids) for id, ids in prompts.items() if id not in early)
        starts = list(range(0, len(fitting), batch_size))
        # in random order: a time limit must not leave only short prompts, and the bar's estimate must hold
        random.Random(seed + begin).shuffle(starts)

        for start in starts:
            yield number, [(id, ids) for _, id, ids in fitting[start : start + batch_size]]
            number += 1


class _Generator:
    """Answers batches of prompts with `model.generate`, padded on the left.

    Not with transformers' continuous batching (`generate_batch`): its greedy tokens are the same in float32, but on a
    CPU it was no faster (90 tokens a CPU second against 92: SmolLM2-135M, bfloat16, 24 prompts). All its requests draw
    from one seed, so a sampled run that was killed would not end as it would have.
    """

    def __init__(self, model, reader: AnswerReader, max_new_tokens: int, temperature: float, top_p: float):
        self.model, self.reader, tokenizer = model, reader, reader.tokenizer
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.ends = sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})

        # padding is masked, so any id within the target's embeddings will do; the tokenizer's may lie beyond them
        rows = model.config.get_text_config().vocab_size
        self.pad = next(i for i in (tokenizer.pad_token_id, *self.ends, 0) if i is not None and 0 <= i < rows)

        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        # every option is set, or the model's generation_config would fill it in
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            **(sampling if temperature > 0 else {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}),
        )

        length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.longest_prompt = (length or 10**9) - max_new_tokens
        if self.longest_prompt < 1:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens}, but `target` reads {length} tokens at most, prompts included: "
                "lower it, or name a different target."
            )

    def prompts(self, ids: list[int], chats: list, tools: list, refused: dict[int, str]) -> dict[int, list[int]]:
        """Return the token ids of each record's prompt; put the reason into `refused` if the template refuses it."""
        texts = {}
        for id, messages, offered in zip(ids, chats, tools, strict=True):
            try:
                texts[id] = self.reader.renderer.prompt(messages, offered)
            except TemplateRefusal as problem:
                refused[id] = str(problem)
            except TemplateLimit as problem:
                raise TemplateLimit(f"Record {id} and the chat template of `target`'s tokenizer: {problem}.") from None

        if not texts:
            return {}
        found = self.reader.tokenizer(list(texts.values()), add_special_tokens=False, verbose=False)["input_ids"]
        refused |= {
            id: "it makes a prompt without tokens" for id, tokens in zip(texts, found, strict=True) if not tokens
        }
        return {id: tokens for id, tokens in zip(texts, found, strict=True) if tokens}

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], before: list[Answer | None], seed: int) -> list[Answer]:
        """Return the answer to each prompt; `before` holds the previous answer in each prompt, if any."""
        device, longest = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
        return [self._answer(*said) for said in zip(prompts, output[:, longest:].tolist(), before, strict=True)]

    def _answer(self, prompt: list[int], ids: list[int], before: Answer | None) -> Answer:
        end = next((n for n, token in enumerate(ids) if token in self.ends), None)
        message = self.reader.message(prompt, ids[:end])
        reason, said = ("length", ids) if end is None else ("stop", ids[: end + 1])
        return said_answer(message, reason, prompt, said, before)
