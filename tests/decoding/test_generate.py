"""`speculative_generate` around chain and tree: batches, streaming, what reaches the host, and what is refused."""

import re

import pytest
import torch
from chain_models import generate, make_draft, make_target, random_prompts
from tiny_model_types import tiny_model_type
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BloomConfig, LlamaForCausalLM, MistralConfig
from transformers.generation.streamers import BaseStreamer

from hf_eagle.decoding import speculative_generate, target_generate
from hf_eagle.decoding.caches import check_cache
from hf_eagle.decoding.target_run import why_alone
from hf_eagle.targets.target import FrozenTarget


CHAIN = {"num_speculative_tokens": 3}
TREE = {"method": "tree", "depth": 3, "top_k": 4, "total_tokens": 12}
# what a config may say of its layers, which transformers' caches cannot follow
UNKNOWN = [
    {"layer_types": ["of a new kind"] * 4},
    {"layer_types": ["sliding_attention"] * 4},  # and no window
    {"layer_types": ["chunked_attention"] * 4},
    {"layer_types": ["sliding_attention"] * 4, "sliding_window": None},
    {"layer_types": 4},
]
both = pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_draft(target, draft_vocab_size=40, tap_ids=[0, 2, 3])


def left_padded(prompts, pad=0):
    """Prompts of any lengths -> ids and mask."""
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


def unequal_prompts(lengths, seed):
    return [random_prompts(1, length, seed + i)[0].tolist() for i, length in enumerate(lengths)]


class TestBatches:
    @both
    def test_every_row_is_what_it_is_alone(self, pair, shape):
        target, draft = pair
        prompts = unequal_prompts([1, 9, 4, 9, 2, 17], seed=10)
        alone = [speculative_generate(*pair, torch.tensor([p]), max_new_tokens=20, **shape) for p in prompts]
        # rows that end early leave the batch, from its middle too
        eos = {alone[1].answers[0][2], alone[5].answers[0][9]}
        alone = [
            speculative_generate(*pair, torch.tensor([p]), max_new_tokens=20, eos_token_ids=eos, **shape)
            for p in prompts
        ]
        expected = [generate(target, torch.tensor([p]), 20, eos)[0, len(p) :].tolist() for p in prompts]
        assert len({len(answer) for answer in expected}) > 2

        ids, mask = left_padded(prompts)
        out = speculative_generate(target, draft, ids, mask, max_new_tokens=20, eos_token_ids=eos, **shape)
        assert out.answers == expected
        assert out.drafts == [single.drafts[0] for single in alone]
        assert out.accepted_per_position == [single.accepted_per_position[0] for single in alone]
        assert out.rounds == max(out.drafts)
        assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
        for row, answer in zip(out.sequences[:, ids.shape[1] :].tolist(), expected, strict=True):
            assert row == answer + [0] * (len(row) - len(answer))

    def test_rows_of_one_length_left_by_a_faster_one_count_as_alone(self, pair):
        """The last round of the row that leaves has more new tokens than those of the rows that stay."""
        prompts = random_prompts(28, 6, seed=21)
        alone = [speculative_generate(*pair, prompt[None], max_new_tokens=20, **CHAIN) for prompt in prompts]
        rounds = [out.accepted_by_round[0] for out in alone]
        behind = [place for place in range(28) if rounds[place][-1] > 0]

        met = 0
        for fast in behind:
            end = len(rounds[fast])
            slow = [place for place in range(28) if len(rounds[place]) > end + 1]
            slow = [place for place in slow if sum(rounds[place][:end]) == sum(rounds[slow[0]][:end])]
            slow = [place for place in slow if rounds[place][end - 1] < rounds[fast][-1]]
            if slow:
                kept = [fast, *slow]
                batch = speculative_generate(*pair, prompts[kept], max_new_tokens=20, **CHAIN)
                assert batch.accepted_by_round == [rounds[place] for place in kept]
                met += 1
        assert met > 2

    @both
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_output_is_that_of_generate_with_left_padding(self, shape, attention):
        target = make_target(MistralConfig, sliding_window=6)
        target.model.set_attn_implementation(attention)
        draft = make_draft(target, tap_ids=[0, 2, 3])
        ids, mask = left_padded(unequal_prompts([3, 8, 12], seed=30))
        out = speculative_generate(target, draft, ids, mask, max_new_tokens=16, **shape)
        theirs = target.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0
        )
        assert torch.equal(out.sequences, theirs)
        assert sum(map(sum, out.accepted_per_position)) > 0

    @both
    def test_padding_tokens_do_not_matter(self, pair, shape):
        prompts = unequal_prompts([2, 6], seed=50)
        zeros, others = (left_padded(prompts, pad=pad) for pad in (0, 33))
        answers = [speculative_generate(*pair, *x, max_new_tokens=12, **shape).answers for x in (zeros, others)]
        assert answers[0] == answers[1]

    def test_the_target_alone_is_generate(self, pair):
        target, _ = pair
        prompts = unequal_prompts([1, 9, 4], seed=60)
        eos = {generate(target, torch.tensor([prompts[1]]), 6)[0, -1].item()}
        expected = [generate(target, torch.tensor([p]), 20, eos)[0, len(p) :].tolist() for p in prompts]
        assert target_generate(target, *left_padded(prompts), max_new_tokens=20, eos_token_ids=eos) == expected

    def test_longer_than_the_cache_was_made_for(self):
        target = make_target(max_position_embeddings=1024)
        draft = make_draft(target, tap_ids=[0, 2, 3])
        prompt = random_prompts(1, 5, seed=1)
        out = speculative_generate(target, draft, prompt, max_new_tokens=600, **CHAIN)
        theirs = generate(target, prompt, 600)
        assert torch.equal(out.sequences, theirs)


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        assert not self.ended and value.device.type == "cpu"
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


@both
def test_streams_the_prompt_and_the_tokens_of_every_round(pair, shape):
    prompt = random_prompts(1, 5, seed=3)
    recorder = Recorder()
    out = speculative_generate(*pair, prompt, max_new_tokens=20, streamer=recorder, **shape)
    assert recorder.puts[0] == prompt[0].tolist() and len(recorder.puts[1]) == 1
    assert sum(recorder.puts[1:], []) == out.answers[0]
    assert len(recorder.puts) == 2 + out.drafts[0] and max(map(len, recorder.puts[1:])) > 1
    assert recorder.ended == 1


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values that are read, sizes that depend on values, copies."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.seen, self.lists = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        index_by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        to_cpu = name in ("_to_copy", "copy_") and "device" in (kwargs or {})
        if name in self.WAITS or index_by_mask or to_cpu:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Counts reads that the dispatcher sees, and `tolist`, which it does not see on the CPU."""
    counter, tolist = HostReads(), torch.Tensor.tolist

    def counted(self):
        counter.lists += 1
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    return counter


@both
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "sampling_top_k": 20}])
def test_one_transfer_to_the_host_a_round(pair, shape, rows, sampling, reads):
    lengths = [5, 3, 7][:rows]
    ids, mask = left_padded(unequal_prompts(lengths, seed=3))
    sampling = sampling | ({"generator": torch.Generator().manual_seed(0)} if sampling else {})

    def count(max_new_tokens):
        reads.seen, reads.lists = [], 0
        with reads:
            out = speculative_generate(*pair, ids, mask, max_new_tokens=max_new_tokens, **shape, **sampling)
        return out.rounds, reads.lists, reads.seen

    speculative_generate(*pair, ids, mask, max_new_tokens=2, **shape)  # what is looked at once a model
    (few, few_lists, few_seen), (many, many_lists, many_seen) = count(4), count(40)
    assert many > few + 5
    assert many_lists - few_lists == many - few
    assert many_seen == few_seen, "a round reads values of its own"


def test_the_counter_sees_what_waits():
    counter, x = HostReads(), torch.arange(4)
    with counter:
        int(x.sum()), x.nonzero(), x[x > 1], bool((x > 1).any())
    assert len(counter.seen) == 4


@both
def test_one_target_forward_a_round(pair, shape):
    target, draft = pair
    forwards = []
    handle = target.model.model.register_forward_hook(lambda *_: forwards.append(1))
    speculative_generate(target, draft, random_prompts(1, 5, seed=3), max_new_tokens=2, **shape)
    forwards.clear()
    out = speculative_generate(target, draft, random_prompts(2, 5, seed=3), max_new_tokens=20, **shape)
    handle.remove()
    assert len(forwards) == 1 + out.rounds == 1 + max(out.drafts)


class TestErrors:
    def call(self, target=None, draft=None, prompt=((1, 2),), mask=None, **arguments):
        target = target or make_target()
        draft = draft or make_draft(target, tap_ids=[0, 2, 3], steps=0)
        mask = mask and torch.tensor(mask)
        return speculative_generate(target, draft, torch.tensor(prompt), mask, **dict(max_new_tokens=4) | arguments)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (dict(num_speculative_tokens=0), "`num_speculative_tokens` must be at least 1, but is 0"),
            (dict(max_new_tokens=0), "`max_new_tokens` must be at least 1, but is 0"),
            (dict(method="beam"), "`method` must be one of chain, tree, but is 'beam'"),
            (dict(depth=3), "`depth` is 3, which means nothing to `method='chain'`"),
            (dict(method="tree", num_speculative_tokens=3), "`num_speculative_tokens` is 3, which means nothing to"),
            (
                dict(method="tree", depth=2, top_k=2, total_tokens=7),
                "`total_tokens` is 7, but .* can keep 2 to 6 nodes",
            ),
            (dict(method="tree", depth=5, total_tokens=4), "`total_tokens` is 4, but .* can keep 5 to"),
            (dict(method="tree", depth=1, top_k=68), "`top_k` is 68, but the draft can propose only 67"),
            (dict(temperature=-1.0), "`temperature` must not be negative, but is -1.0"),
            (dict(temperature=1.0, top_p=0.0), "`top_p` must lie above 0 and at most at 1, but is 0.0"),
            (dict(temperature=1.0, sampling_top_k=0), "`sampling_top_k` must be at least 1, but is 0"),
            (dict(top_p=0.9), "`top_p` is set, but `temperature` is 0"),
            (dict(sampling_top_k=5), "`sampling_top_k` is set, but `temperature` is 0"),
            (dict(prompt=((),)), r"`input_ids` must be prompts of shape .* has shape \(1, 0\)"),
            (
                dict(prompt=((1, 2), (3, 4)), streamer=Recorder()),
                "`streamer` takes one prompt, but `input_ids` holds 2",
            ),
            (dict(mask=((1, 0),)), "`attention_mask` has zeros after a token; pad prompts on the left"),
            (dict(mask=((0, 0),)), "give each at least one token"),
            (dict(mask=((1,),)), r"`attention_mask` has shape \(1, 1\), but `input_ids` \(1, 2\)"),
        ],
    )
    def test_arguments_that_do_not_fit(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            self.call(**arguments)

    def test_draft_of_another_target(self):
        draft = make_draft(make_target(), tap_ids=[0, 2, 3], steps=0)
        with pytest.raises(ValueError, match="`draft` was made for a vocabulary of 67 tokens, but the target has 80"):
            self.call(make_target(vocab_size=80), draft)
        with pytest.raises(ValueError, match="`draft` was made for a target with hidden size 32, .* is 64"):
            self.call(make_target(hidden_size=64), draft)
        with pytest.raises(ValueError, match=r"trained on the taps \[0, 2, 3\], but the target takes \[1, 2, 3\]"):
            self.call(make_target(tap_ids=(1, 2, 3)), draft)

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("taps", [None, [1], [0, 1, 2, 3]])
    def test_taps_that_a_draft_cannot_read(self, taps, named):
        """None at all, or another number of them, also for a draft whose config names none."""
        target = make_target()
        draft = make_draft(target, tap_ids=[0, 2, 3], steps=0)
        if not named:
            draft.config.eagle_aux_hidden_state_layer_ids = None
        target.tap_ids = taps
        wanted = "was trained on the taps [0, 2, 3]" if named else "looks at 3 taps, which its config does not name"
        with pytest.raises(ValueError, match=re.escape(f"`draft` {wanted}, but the target takes {taps or []}")):
            self.call(target, draft)

    @pytest.mark.parametrize("alone", [True, False])
    def test_ranks_that_would_draw_other_tokens(self, alone):
        target = make_target()
        target.sharding = object()  # whatever it is, it is not asked
        with pytest.raises(ValueError, match="`generator` is None and `temperature` is 0.5, but the target is spread"):
            if alone:
                target_generate(target, torch.tensor([[1, 2]]), max_new_tokens=4, temperature=0.5)
            else:
                self.call(target, make_draft(make_target(), tap_ids=[0, 2, 3], steps=0), temperature=0.5)

    def test_attention_without_masks(self):
        target = make_target()
        draft = make_draft(target, tap_ids=[0, 2, 3], steps=0)
        target.model.set_attn_implementation("flex_attention")
        with pytest.raises(
            ValueError, match="`attn_implementation='flex_attention'`, which takes no 4-D attention mask"
        ):
            self.call(target, draft, **TREE)

    def test_targets_that_do_not_obey_masks(self):
        class Deaf(LlamaForCausalLM):
            def forward(self, *args, attention_mask=None, **kwargs):
                return super().forward(*args, **kwargs)

        deaf = FrozenTarget(Deaf(make_target().config), tap_ids=[0, 2, 3])
        # positions by its own rule, from the number of keys
        bloom = FrozenTarget(make_target(BloomConfig, n_layer=4, n_head=4).model, tap_ids=[0, 2, 3])
        for target, name in ((deaf, "Deaf"), (bloom, "BloomForCausalLM")):
            with pytest.raises(ValueError, match=f"`target` is a {name}, which does not obey a 4-D attention mask"):
                self.call(target, make_draft(make_target(), tap_ids=[0, 2, 3], steps=0), **TREE)

    @pytest.mark.parametrize("branches", [False, True])
    def test_why_a_target_decodes_alone_is_said(self, branches):
        """A tree needs masks for one prompt too, so a target without them cannot verify it at all."""
        assert why_alone(make_target(), branches) is None
        bloom = make_target(BloomConfig, n_layer=4, n_head=4)
        if branches:
            with pytest.raises(ValueError, match="^`target` is a BloomForCausalLM, which does not obey a 4-D"):
                why_alone(bloom, branches)
        else:
            told = why_alone(bloom)
            assert told.startswith("Every prompt is decoded alone: `target` is a BloomForCausalLM, which does not obey")

    def test_a_chain_for_one_prompt_needs_no_masks(self):
        target = make_target(BloomConfig, n_layer=4, n_head=4, initializer_range=0.2)
        draft = make_draft(make_target(), tap_ids=[0, 2, 3], steps=0)
        prompt = random_prompts(1, 5, seed=3)
        out = speculative_generate(target, draft, prompt, max_new_tokens=12, **CHAIN)
        assert torch.equal(out.sequences, generate(target, prompt, 12))

    def test_a_state_that_cannot_be_taken_back(self):
        """Keys of another kind, and a state that no cache shows."""
        draft = make_draft(make_target(), tap_ids=[0, 2, 3], steps=0)
        sparse = FrozenTarget(tiny_model_type("deepseek_v32", vocab_size=67), tap_ids=[0, 2, 3])
        hidden = make_target()
        hidden.model._is_stateful = True
        for target, name, kept in (
            (sparse, "DeepseekV32ForCausalLM", "DynamicIndexedLayer"),
            (hidden, "LlamaForCausalLM", "a recurrent state"),
        ):
            said = f"`target` is a {name}, which keeps {kept} between tokens in a way that rejected tokens cannot be"
            with pytest.raises(ValueError, match=said):
                self.call(target, draft)

    @pytest.mark.parametrize("changes", UNKNOWN, ids=str)
    def test_layers_that_the_caches_do_not_know(self, changes):
        target = make_target()
        for name, value in changes.items():
            setattr(target.config, name, value)
        with pytest.raises(ValueError, match=r"`target` is a LlamaForCausalLM, which keeps a cache of its own \("):
            check_cache(target)
