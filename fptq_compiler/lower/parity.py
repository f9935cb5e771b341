"""The written file against `Program.run`: codes equal, logits equal.

Rounding makes a comparison of logits alone say little: a value that lies on the tie between two
codes may round either way after a float matmul that sums in another order, and the difference
travels on. So every activation code of ONNX Runtime is compared with ours where it is made; a
difference is allowed only at a tie, is counted, and ONNX Runtime's code is taken over, so that
what follows is compared on equal terms.

In half precision every value is off by a few roundings, which are not a tie but a share of the
largest value; that share is the slack, and the same comparison allows for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import cache_ops, evaluate, ops
from fptq_compiler.graph.evaluate import Environment, bind_inputs, last_uses, run_node
from fptq_compiler.graph.inputs import input_node
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.blocks import BLOCKS, unpack_blocks
from fptq_compiler.lower.contract import ACCURACY_LEVEL, contract_of, session_options
from fptq_compiler.lower.element_type import element_type
from fptq_compiler.memory import collect_cycles, return_freed_memory
from fptq_compiler.quant.pairs import unpack_pairs

LINEAR = torch.ops.aten.linear.default
TIE = 0.02  # of a code: values this near to a tie may round either way
LOGITS = 1e-4  # relative to the largest logit, with ties taken over


@dataclass
class Parity:
    """What the comparison found.

    Attributes:
        weight_codes_equal: whether every packed weight holds our codes.
        codes: activation codes compared.
        ties: codes that differ by one at a tie.
        wrong: codes that differ otherwise; must be 0.
        worst: how far beyond a tie, in codes, the worst of those lies.
        logits: relative error of the logits with ties taken over.
        free_logits: the same as both run by themselves, ties and their consequences included.
        level4_logits: what accuracy level 4 changes where only weights are quantised, or None.
        slack: of a tensor's largest value, what the float type of the file may change.
    """

    weight_codes_equal: bool = True
    codes: int = 0
    ties: int = 0
    wrong: int = 0
    worst: float = 0.0
    logits: float = 0.0
    free_logits: float = 0.0
    level4_logits: float | None = None
    slack: float = 0.0

    def failures(self) -> list[str]:
        """What does not hold, in words."""
        found = []
        if not self.weight_codes_equal:
            found.append("the weight codes in the file are not the program's")
        if self.wrong:
            found.append(
                f"{self.wrong} of {self.codes} activation codes differ away from any tie "
                f"(by {self.worst:.3f} of a code at worst)"
            )
        allowed = LOGITS + self.slack
        if not self.logits <= allowed:
            found.append(
                f"the logits differ by {self.logits:.2e} of the largest, expected {allowed:.0e}"
            )
        return found

    def to_dict(self) -> dict[str, float | int | str]:
        """For the report."""
        found: dict[str, float | int | str] = {
            "weight codes equal": str(self.weight_codes_equal),
            "activation codes compared": self.codes,
            "activation codes apart at ties": self.ties,
            "activation codes wrong": self.wrong,
            "logits, relative": self.logits,
            "logits, relative, ties not taken over": self.free_logits,
        }
        if self.level4_logits is not None:
            found["logits, relative, at accuracy level 4, ONNX Runtime's default"] = (
                self.level4_logits
            )
        return found


def check_half_parity(
    program: Program, path: Path, ids: Tensor, folder: Path, config: Mapping[str, str]
) -> Parity:
    """The same of a file in float16, with a slack for its roundings.

    Every linear, and what stands between it and the next, rounds to float16: errors of at most
    half of its epsilon, which are independent and so grow as the square root of their number.
    """
    linears = len(program.call_nodes(ops.linear)) + len(program.call_nodes(LINEAR))
    slack = torch.finfo(torch.float16).eps * linears**0.5
    return check_parity(program, path, ids, folder, config, slack)


def check_parity(
    program: Program, path: Path, ids: Tensor, folder: Path, config: Mapping[str, str],
    slack: float = 0.0,
) -> Parity:
    """Run both on token ids (B, S); with a cache, chunk by chunk.

    Args:
        program: frozen.
        path: the ONNX file.
        ids: token ids.
        folder: where a copy of the file with its codes as outputs may lie for the while.
        config: entries of the session's configuration.
        slack: of a tensor's largest value, what the float type of the file may change.
    """
    parity = Parity(slack=slack)
    model = ir.load(path)
    parity.weight_codes_equal = _weight_codes_equal(program, model)
    names = _expose_codes(program, model)
    exposed = folder / "exposed.onnx"
    ir.save(model, exposed, external_data="exposed.data")
    del model
    collect_cycles()
    plain = _session(path, config)
    freely = [
        plain.run(None, _feeds(program, inputs, plain)) for inputs in _runs(program, ids, plain)
    ]
    del plain
    return_freed_memory()
    session = _session(exposed, config)
    cached = program.call_nodes(cache_ops.cached_attention)
    outputs = ["logits", *names.values(), *program.outputs[1:]]
    for inputs, free in zip(_runs(program, ids, session), freely, strict=True):
        found = session.run(outputs, _feeds(program, inputs, session))
        codes = dict(zip((*names, *_stored_names(cached)), found[1:], strict=True))
        forced = _forced_logits(program, inputs, codes, parity)
        parity.logits = max(parity.logits, _relative(_tensor(found[0]), forced))
        ours = evaluate.logits(program.module, inputs)
        error = _relative(_tensor(free[0]), ours)
        parity.free_logits = max(parity.free_logits, error)
    del session
    exposed.unlink()
    (folder / "exposed.data").unlink(missing_ok=True)
    level_counts = ACCURACY_LEVEL in config and not names
    if level_counts and contract_of(program).weight_only_linears:
        fast = _session(path, {**config, ACCURACY_LEVEL: "4"})
        (inputs, *_) = _runs(program, ids, fast)
        (logits,) = fast.run(["logits"], _feeds(program, inputs, fast))
        parity.level4_logits = _relative(_tensor(logits), program.run(inputs[0]))
    return parity


def _runs(
    program: Program, ids: Tensor, session: onnxruntime.InferenceSession
) -> Iterator[list[Tensor]]:
    """The inputs of each run: all tokens at once, or with a cache a half, a chunk, one token.

    What ONNX Runtime stored is what both sides read in the next run.
    """
    if "cached" not in program.facts:
        yield program.arguments(ids)
        return
    length = ids.shape[1]
    bounds = [0, length // 2, length - 1, length]
    past = program.arguments(ids)[2:]
    for start, stop in pairwise(bounds):
        seen = torch.ones((ids.shape[0], stop), dtype=torch.int64)
        inputs = [ids[:, start:stop].contiguous(), seen, *past]
        yield inputs
        if stop < length:
            stored = session.run(list(program.outputs[1:]), _feeds(program, inputs, session))
            past = [_tensor(x) for x in stored]


def _feeds(
    program: Program, inputs: Sequence[Tensor], session: onnxruntime.InferenceSession
) -> dict[str, np.ndarray[Any, Any]]:
    """By name; what the file has in float16 came from there."""
    half = {entry.name for entry in session.get_inputs() if entry.type == "tensor(float16)"}
    return {
        s.name: x.numpy().astype(np.float16) if s.name in half else x.numpy()
        for s, x in zip(program.inputs, inputs, strict=True)
    }


def _tensor(values: np.ndarray[Any, Any]) -> Tensor:
    """As torch has it, half precision in float32."""
    found = torch.from_numpy(values)
    return found.float() if found.dtype == torch.float16 else found


def _stored_names(cached: Sequence[Node]) -> list[str]:
    """Under which names `_forced_logits` finds what each attention stored."""
    return [f"{n.name}.{kind}" for n in cached for kind in ("key", "value")]


def _session(path: Path, config: Mapping[str, str]) -> onnxruntime.InferenceSession:
    options = session_options(config)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _weight_codes_equal(program: Program, model: ir.Model) -> bool:
    initializers = model.graph.initializers
    for node in (*program.call_nodes(ops.linear), *program.call_nodes(ops.embedding)):
        argument = input_node(node, 1)
        name = str(argument.target)
        expected = program.parameter(name).numpy()
        stored, blocks = initializers.get(name), initializers.get(f"{name}{BLOCKS}")
        if stored is not None and stored.const_value is not None:
            codes = stored.const_value.numpy().astype(expected.dtype)
        elif blocks is not None and blocks.const_value is not None:
            bits = node.args[4]
            assert isinstance(bits, int)
            codes = unpack_blocks(blocks.const_value.numpy(), expected.shape[0], bits)
        else:
            return False
        if not np.array_equal(codes, expected):
            return False
        for value in (stored, blocks):
            if value is not None and isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.release()  # it keeps what it unpacked
    return True


def _expose_codes(program: Program, model: ir.Model) -> dict[str, str]:
    """Make every QuantizeLinear's output an output of the model; node name -> output name.

    The emitter keeps the order of the program's quantisers.
    """
    quantizers = program.call_nodes(ops.fake_quantize)
    producers = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    if len(producers) != len(quantizers):
        message = f"{len(producers)} QuantizeLinear in the file, {len(quantizers)} in the program"
        raise ValueError(message)
    names = {}
    for quantizer, producer in zip(quantizers, producers, strict=True):
        value = producer.outputs[0]
        dtype = element_type(value)
        assert dtype is not None
        value.type = ir.TensorType(dtype)
        model.graph.outputs.append(value)
        names[quantizer.name] = str(value.name)
    return names


def _forced_logits(
    program: Program,
    inputs: Sequence[Tensor],
    codes: dict[str, np.ndarray[Any, Any]],
    parity: Parity,
) -> Tensor:
    """Our logits with ONNX Runtime's codes taken over, each compared first."""
    module = program.module
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr")]
    environment: Environment = bind_inputs(module, inputs, None)
    dying = last_uses(nodes)
    value: Any = None
    with torch.no_grad():
        for node in nodes:
            if node.name in codes:
                value = _compare(node, environment, torch.from_numpy(codes[node.name]), parity)
            elif node.target is cache_ops.cached_attention:
                stored = [_tensor(codes[n]) for n in _stored_names([node])]
                value = _compare_stored(program, node, environment, stored, parity)
            else:
                value = run_node(module, node, environment, None)
            environment[node] = value
            for dead in dying.get(node, ()):
                environment.pop(dead, None)
    first = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(first, Tensor)
    return first


def _compare(node: Node, environment: Environment, theirs: Tensor, parity: Parity) -> Tensor:
    """Compare the codes of one quantiser; gives the values of ONNX Runtime's codes."""
    source, scale, zero, bits, _ = node.args
    assert isinstance(source, Node)
    assert isinstance(scale, float)
    assert isinstance(zero, int)
    assert isinstance(bits, int)
    value = environment[source]
    assert isinstance(value, Tensor)
    # Codes in INT8 are lower by half of the range.
    lowest = -(1 << (bits - 1)) if theirs.dtype == torch.int8 else 0
    centred = theirs.float() - lowest - zero
    step = torch.tensor(scale, dtype=torch.float32)
    _count(value, centred, step, (-zero, (1 << bits) - 1 - zero), parity)
    return centred * step


def _compare_stored(
    program: Program, node: Node, environment: Environment, theirs: list[Tensor], parity: Parity
) -> tuple[Tensor, ...]:
    """Compare what one attention stored; gives what follows from ONNX Runtime's codes."""
    given = evaluate.arguments(program.module, node, environment)
    arguments = cache_ops.CachedAttention(*given)
    bits = arguments.bits
    half = 1 << (bits - 1)
    for values, stored, scale in zip(
        arguments.new_values(), theirs, (arguments.key_scale, arguments.value_scale), strict=True
    ):
        new = stored[:, :, stored.shape[2] - values.shape[2] :]
        if scale is None:
            continue
        codes = new if bits == 8 else unpack_pairs(new)
        _count(values, codes.float(), scale, (-half, half - 1), parity)
    return (arguments.attend(*theirs), *theirs)


def _count(
    values: Tensor, theirs: Tensor, scale: Tensor, limits: tuple[int, int], parity: Parity
) -> None:
    """Count the codes, zero-point taken off, that are not those of the values."""
    exact = values.float() / scale
    ours = exact.round().clamp(*limits)
    apart = ours != theirs
    parity.codes += ours.numel()
    if bool(apart.any()):
        # A code is right if the value lies within half a step of it; at a tie both are.
        beyond = ((theirs - exact).abs() - 0.5)[apart]
        near = beyond <= TIE + parity.slack * float(exact.clamp(*limits).abs().max())
        parity.ties += int(near.sum())
        parity.wrong += int((~near).sum())
        if bool((~near).any()):
            parity.worst = max(parity.worst, float(beyond[~near].max()))
