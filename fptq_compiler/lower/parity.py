"""The written file against `Program.run`: codes equal, logits equal.

Rounding makes a comparison of logits alone say little: a value that lies on the tie between two
codes may round either way after a float matmul that sums in another order, and the difference
travels on. So every activation code of ONNX Runtime is compared with ours where it is made; a
difference is allowed only at a tie, is counted, and ONNX Runtime's code is taken over, so that
what follows is compared on equal terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor
from torch.fx import Node

from fptq_compiler.graph import ops
from fptq_compiler.graph.evaluate import Environment, bind_inputs, last_uses, run_node
from fptq_compiler.graph.program import Program
from fptq_compiler.lower.contract import session_options
from fptq_compiler.quant.grid import Grid

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
        level4_logits: what ONNX Runtime's default accuracy level changes (weight-only), or None.
    """

    weight_codes_equal: bool = True
    codes: int = 0
    ties: int = 0
    wrong: int = 0
    worst: float = 0.0
    logits: float = 0.0
    free_logits: float = 0.0
    level4_logits: float | None = None

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
        if not self.logits <= LOGITS:
            found.append(
                f"the logits differ by {self.logits:.2e} of the largest, expected {LOGITS:.0e}"
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
            found["logits, relative, at ONNX Runtime's default accuracy level 4"] = (
                self.level4_logits
            )
        return found


def check_parity(program: Program, path: Path, ids: Tensor, folder: Path) -> Parity:
    """Run both on token ids (B, S).

    Args:
        program: frozen.
        path: the ONNX file.
        ids: token ids.
        folder: where a copy of the file with its codes as outputs may lie for the while.
    """
    parity = Parity()
    feeds = {
        spec.name: value.numpy()
        for spec, value in zip(program.inputs, program.arguments(ids), strict=True)
    }
    model = ir.load(path)
    parity.weight_codes_equal = _weight_codes_equal(program, model)
    names = _expose_codes(program, model)
    exposed = folder / "exposed.onnx"
    ir.save(model, exposed, external_data="exposed.data")
    del model
    plain = _session(path)
    (logits,) = plain.run(["logits"], feeds)
    del plain
    codes: dict[str, np.ndarray[Any, Any]] = {}
    if names:
        session = _session(exposed)
        found = session.run(["logits", *names.values()], feeds)
        codes = dict(zip(names, found[1:], strict=True))
        del session
    exposed.unlink()
    (folder / "exposed.data").unlink(missing_ok=True)
    forced = _forced_logits(program, ids, codes, parity)
    reference = torch.from_numpy(found[0] if names else logits)
    parity.logits = _relative(reference, forced)
    parity.free_logits = _relative(torch.from_numpy(logits), program.run(ids))
    if not names and any(n.args[4] == 4 for n in program.call_nodes(ops.linear)):
        (fast,) = _session(path, level=4).run(["logits"], feeds)
        parity.level4_logits = _relative(torch.from_numpy(fast), forced)
    return parity


def _session(path: Path, level: int = 1) -> onnxruntime.InferenceSession:
    options = session_options(accuracy_level=level)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _weight_codes_equal(program: Program, model: ir.Model) -> bool:
    initializers = model.graph.initializers
    for node in (*program.call_nodes(ops.linear), *program.call_nodes(ops.embedding)):
        argument = node.args[1]
        assert isinstance(argument, Node)
        name = str(argument.target)
        stored = initializers.get(name)
        if stored is None or stored.const_value is None:
            return False
        expected = program.parameter(name).numpy()
        if not np.array_equal(stored.const_value.numpy().astype(np.int8), expected):
            return False
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
        value.type = ir.TensorType(ir.DataType.UINT8)
        model.graph.outputs.append(value)
        names[quantizer.name] = str(value.name)
    return names


def _forced_logits(
    program: Program, ids: Tensor, codes: dict[str, np.ndarray[Any, Any]], parity: Parity
) -> Tensor:
    """Our logits with ONNX Runtime's codes taken over, each compared first."""
    module = program.module
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr")]
    environment: Environment = bind_inputs(module, program.arguments(ids), None)
    dying = last_uses(nodes)
    value: Any = None
    with torch.no_grad():
        for node in nodes:
            if node.name in codes:
                value = _compare(node, environment, torch.from_numpy(codes[node.name]), parity)
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
    assert isinstance(zero, int)
    assert isinstance(bits, int)
    zero_point, grid = float(zero), Grid(bits, symmetric=False)
    step = torch.tensor(scale, dtype=torch.float32)
    value = environment[source]
    assert isinstance(value, Tensor)
    exact = value.float() / step
    ours = (exact.round() + zero_point).clamp(grid.lowest, grid.highest)
    theirs = theirs.float()
    apart = ours != theirs
    parity.codes += ours.numel()
    if bool(apart.any()):
        # A code is right if the value lies within half a step of it; at a tie both are.
        beyond = ((theirs - zero_point - exact).abs() - 0.5)[apart]
        near = beyond <= TIE
        parity.ties += int(near.sum())
        parity.wrong += int((~near).sum())
        if bool((~near).any()):
            parity.worst = max(parity.worst, float(beyond[~near].max()))
    return (theirs - zero_point) * step
