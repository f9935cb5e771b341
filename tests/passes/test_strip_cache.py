"""StripCache and DropInputs on hand-written models: one layer, learned positions, two caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from fptq_compiler.errors import FptqError, UnsupportedModelError, VerificationError
from fptq_compiler.graph import evaluate
from fptq_compiler.graph.dump import dump
from fptq_compiler.graph.evaluate import longest_sequence
from fptq_compiler.graph.pipeline import run_passes
from fptq_compiler.graph.program import Program
from fptq_compiler.graph.unlift import unlift
from fptq_compiler.graph.verify import relative_error
from fptq_compiler.passes import FIND_SITES
from fptq_compiler.passes.add_cache import AddCache
from fptq_compiler.passes.drop_inputs import DropInputs
from fptq_compiler.passes.strip_cache import StripCache
from tests.passes.steps import EXACT, assert_settled, pick, run

VOCABULARY, WIDTH, HEADS, POSITIONS = 23, 8, 2, 32
FREE = Dim.DYNAMIC


class Decoder(nn.Module):
    """Embedding and learned positions, one attention, a head; subclasses hold the cache."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(POSITIONS, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def split(self, x: Tensor) -> list[Tensor]:
        rows, tokens, _ = x.shape
        heads = [f(x).view(rows, tokens, HEADS, -1) for f in (self.q, self.k, self.v)]
        return [x.transpose(1, 2) for x in heads]

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding(ids) + self.places(positions)

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, shown: Tensor | None) -> Tensor:
        mixed = functional.scaled_dot_product_attention(q, k, v, shown, is_causal=shown is None)
        return self.head(x + self.o(mixed.transpose(1, 2).reshape(x.shape)))


class Growing(Decoder):
    """Past keys and values come in, and go out with the new ones."""

    def forward(self, ids: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        past = past_key.shape[2]
        positions = torch.arange(ids.shape[1]) + self.offset(past)
        x = self.embed(ids, positions)
        q, k, v = self.split(x)
        k, v = self.join(past_key, k), self.join(past_value, v)
        shown = torch.arange(k.shape[2]) <= (torch.arange(ids.shape[1]) + past)[:, None]
        return self.finish(x, q, k, v, shown), self.keep(k), self.keep(v)

    def offset(self, past: int) -> int:
        return past

    def join(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past, new], 2)

    def keep(self, present: Tensor) -> Tensor:
        return present


class Static(Decoder):
    """Keys and values of all positions in buffers, and the mask's row of each position."""

    keys: Tensor
    values: Tensor
    visible: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("keys", "values"):
            empty = torch.zeros(1, HEADS, POSITIONS, WIDTH // HEADS)
            self.register_buffer(name, empty, persistent=False)
        visible = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril()
        self.register_buffer("visible", visible, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids, positions)
        q, k, v = self.split(x)
        self.write(positions, k, v)
        return self.finish(x, q, self.keys, self.values, self.visible[positions])

    def write(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v


class Masked(Decoder):
    """No cache, but a mask of the tokens and their positions."""

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(ids, position_ids)
        q, k, v = self.split(x)
        tokens = ids.shape[1]
        before = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return self.finish(x, q, k, v, before & self.shown(attention_mask[:, None, None, :]))

    def shown(self, attention_mask: Tensor) -> Tensor:
        return attention_mask.bool()


def growing(module: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Program:
    past = [torch.zeros(2, HEADS, 5, WIDTH // HEADS, dtype=dtype) for _ in range(2)]
    free: Any = {0: FREE, 2: FREE}
    return exported(module or Growing(), (ids(2, 3), *past), ({0: FREE, 1: FREE}, free, free))


def static(module: nn.Module | None = None) -> Program:
    return exported(module or Static(), (ids(1, 3), torch.arange(3)), ({1: FREE}, {0: FREE}))


def masked(module: nn.Module | None = None) -> Program:
    free = {0: FREE, 1: FREE}
    ones = torch.ones(2, 3, dtype=torch.int64)
    places = torch.arange(3).expand(2, 3).contiguous()
    return exported(module or Masked(), (ids(2, 3), ones, places), (free, free, free))


def exported(module: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> Program:
    return unlift(
        torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)
    )


def ids(rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(VOCABULARY, (rows, tokens), generator=generator)


@torch.no_grad()
def plain(module: Decoder, tokens: Tensor) -> Tensor:
    """What the decoder computes of a whole sequence."""
    x = module.embed(tokens, torch.arange(tokens.shape[1]))
    return module.finish(x, *module.split(x), None)


CASES = {"growing": (growing, StripCache()), "static": (static, StripCache()),
         "masked": (masked, DropInputs())}
SIGHT = {
    "growing": ("arange", "embedding_1", "arange_1", "arange_2", "slice_1", "unsqueeze", "le_1"),
    "static": ("arange_default", "embedding_1", "index", "slice_tensor"),
    "masked": ("full_default", "arange_default", "unsqueeze_default", "expand_default",
               "embedding_1", "ones", "tril", "and_1"),
}
"""What positions and masks are made of."""
EXPECTED = {
    "growing": """
arange = arange(sym_size_int_10, device=device(type='cpu'), pin_memory=False)
embedding_1 = embedding(%places.weight, arange)
arange_1 = arange(sym_size_int_10, device=device(type='cpu'), pin_memory=False)
arange_2 = arange(sym_size_int_10, device=device(type='cpu'), pin_memory=False)
slice_1 = slice(arange_2, 0, 0, 9223372036854775807)
unsqueeze = unsqueeze(slice_1, 1)
le_1 = le(arange_1, unsqueeze)
scaled_dot_product_attention = scaled_dot_product_attention(transpose, transpose_1, \
transpose_2, le_1)
""",
    "static": """
arange_default = arange(sym_size_int_9, dtype=torch.int64)
embedding_1 = embedding(%places.weight, arange_default)
index = index(%visible, [arange_default])
slice_tensor = slice(index, 1, 0, sym_size_int_9)
scaled_dot_product_attention = scaled_dot_product_attention(transpose, transpose_1, \
transpose_2, slice_tensor)
""",
    "masked": """
full_default = full([sym_size_int_8, sym_size_int_7], 1, dtype=torch.int64)
arange_default = arange(sym_size_int_7, dtype=torch.int64)
unsqueeze_default = unsqueeze(arange_default, 0)
expand_default = expand(unsqueeze_default, [sym_size_int_8, sym_size_int_7])
embedding_1 = embedding(%places.weight, expand_default)
ones = ones([sym_size_int_7, sym_size_int_7], dtype=torch.bool, device=device(type='cpu'), \
pin_memory=False)
tril = tril(ones)
and_1 = __and__(tril, to)
scaled_dot_product_attention = scaled_dot_product_attention(transpose, transpose_1, \
transpose_2, and_1)
""",
}


@pytest.mark.parametrize("name", CASES)
def test_the_graph(name: str) -> None:
    make, step = CASES[name]
    program = make()
    run(program, step)
    names = (*SIGHT[name], "scaled_dot_product_attention")
    assert pick(program, *names) == EXPECTED[name]
    assert [n.name for n in program.graph.nodes if n.op == "placeholder"] == ["ids"]


@pytest.mark.parametrize("name", CASES)
def test_whole_sequences_of_any_size(name: str) -> None:
    make, step = CASES[name]
    program = make()
    assert run(program, step).changed > 0
    assert [(s.name, s.dims) for s in program.inputs] == [("ids", ("batch", "sequence"))]
    for rows, tokens in [(1, 1), (3, 2), (2, POSITIONS)]:
        found = evaluate.logits(program.module, [ids(rows, tokens)], torch.float64)
        expected = plain(Decoder().double(), ids(rows, tokens))
        assert relative_error(found, expected) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_twice_changes_nothing(name: str) -> None:
    make, step = CASES[name]
    program = make()
    run(program, step)
    assert_settled(program, step)


@pytest.mark.parametrize("name", CASES)
def test_a_cache_of_ours_comes_in_its_place(name: str) -> None:
    """Its own proof runs chunks and padded rows."""
    make, step = CASES[name]
    program = make()
    run_passes(program, (step, *FIND_SITES))
    assert run(program, AddCache(POSITIONS)).changed == 1


def test_a_static_cache_bounds_the_sequence() -> None:
    program = static()
    run(program, StripCache())
    assert longest_sequence(program.module) == POSITIONS


def test_what_the_report_says() -> None:
    programs = [make() for make, _ in CASES.values()]
    for program, (_, step) in zip(programs, CASES.values(), strict=True):
        run(program, step)
    assert [d[:40] for p in programs for d in p.decisions] == [
        "captured with a growing KV cache of 2 te",
        "captured with a static KV cache of 2 ten",
        "inputs attention_mask, position_ids left",
    ]


def test_a_plain_program_is_left_alone() -> None:
    class Plain(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids, torch.arange(ids.shape[1]))
            return self.finish(x, *self.split(x), None)

    program = exported(Plain(), (ids(2, 3),), ({0: FREE, 1: FREE},))
    before = dump(program.module)
    for step in (StripCache(), DropInputs()):
        assert run(program, step).changed == 0
    assert dump(program.module) == before


class Sliding(Growing):
    def keep(self, present: Tensor) -> Tensor:
        return present[:, :, -4:]


class NewFirst(Growing):
    def join(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, past], 2)


class Restarting(Growing):
    """Positions that begin anew with every run: no whole sequence computes that."""

    def offset(self, past: int) -> int:
        return 0


class Codes(Growing):
    """Keys and values in INT8."""

    def join(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past.float() / 16, new], 2)

    def keep(self, present: Tensor) -> Tensor:
        return (present * 16).round().to(torch.int8)


class Adding(Static):
    def write(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys.index_add_(2, positions, k)
        self.values.index_add_(2, positions, v)


def one_token() -> Program:
    return exported(Static(), (ids(1, 1), torch.arange(1)), None)


def fixed_past() -> Program:
    past = [torch.zeros(2, HEADS, 5, WIDTH // HEADS) for _ in range(2)]
    free: Any = {0: FREE}
    return exported(Growing(), (ids(2, 3), *past), ({0: FREE, 1: FREE}, free, free))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: growing(Sliding()), UnsupportedModelError, "a sliding window, or another layout"),
        (lambda: growing(NewFirst()), UnsupportedModelError, "expected the past and then the new"),
        (lambda: growing(Codes(), torch.int8), UnsupportedModelError, "a quantised cache"),
        (lambda: static(Adding()), UnsupportedModelError, "expected index_copy or index_put"),
        (fixed_past, UnsupportedModelError, "exactly 5 tokens, expected dimension 2 dynamic"),
        (one_token, UnsupportedModelError, r"exactly 1 token\(s\) a run.*dynamic_shapes="),
        (lambda: growing(Restarting()), VerificationError, "tokens 4 to 4 through the captured"),
    ],
    ids=["sliding", "new-first", "codes", "adding", "fixed-past", "one-token", "restarting"],
)
def test_what_cannot_be_taken_out(
    make: Callable[[], Program], error: type[FptqError], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(make(), StripCache())


class Inverted(Masked):
    """1 hides a token."""

    def shown(self, attention_mask: Tensor) -> Tensor:
        return attention_mask == 0


class Unmasked(Masked):
    """What is called a mask counts something, and hides nothing."""

    def shown(self, attention_mask: Tensor) -> Tensor:
        return attention_mask >= 0


@pytest.mark.parametrize(
    ("module", "words"), [(Inverted(), "shows no token by 1"), (Unmasked(), "hides no token by 0")]
)
def test_a_mask_is_one_by_what_it_does(module: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"attention_mask {words}"):
        run(masked(module), DropInputs())
