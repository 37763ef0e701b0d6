"""More golden vectors of Transformer Engine, recorded on the device that runs it.

`te_golden_more.pt` (tensors and types, loads with `weights_only=True`) is a list of cases
`{name, kind, kw, dtype, w, b, steps}`; a step is `{x, g, y, dx, dw, db}` and, for delayed scaling, `scaling_fwd` and
`scaling_bwd` with `scale` and `amax_history` as they stand after the step. Cases: a history longer than the run, odd
amaxes (zero, tiny, huge, infinite), E5M2 gradients whose range changes by 2^20, weights that move, block scaling with
its quantized values and scales, several micro-batches with a cached weight. Sizes are small: these vectors become test
data.

`te_casts.pt` holds what TE's quantizers make of all bf16 values and of chosen fp32 ones.
Besides, the measurement answers the questions on which our adapter rests (`adapter: ...`).
"""

from __future__ import annotations

from typing import Any

import torch
from ledger import Ledger, main

INF = float("inf")


def engine() -> tuple[Any, Any, Any]:
    """transformer_engine.pytorch, its recipe module and its extension; torch must be imported before."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex
    from transformer_engine.common import recipe

    return te, recipe, tex


def fp8(te: Any, scaling: Any) -> Any:
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=scaling)
    return te.fp8_autocast(enabled=True, fp8_recipe=scaling)


def state_of(layer: Any) -> dict[str, Any]:
    found = {}
    for direction in ("scaling_fwd", "scaling_bwd"):
        state = layer.fp8_meta.get(direction)
        if state is not None and hasattr(state, "amax_history"):
            kept = {"scale": state.scale, "amax_history": state.amax_history}
            found[direction] = {key: value.detach().cpu().clone() for key, value in kept.items()}
    return found


ODD_INPUTS = {
    "odd": [1.0, 0.0, 1e-30, 1e30, 3.0, 1.0],
    "tiny": [1.0, 1e-36, 1e-38, 1e-40, 1e-45, 1.0],
    "inf": [1.0, 2.0, INF, 1.0, 4.0, 1.0],
    "range": [1.0, 2.0**10, 2.0**-10, 2.0**20, 2.0**-20, 1.0],
}
"""Factor on the input (and the gradient) of each step; INF puts one infinite element into a regular tensor."""


def scaled(values: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    if factor == INF:
        values = values.clone()
        values.view(-1)[7] = INF
        return values.to(dtype)
    return (values * factor).to(dtype)


def run_case(name: str, kind: str, kw: dict[str, Any], dtype: torch.dtype, sizes: tuple[int, int, int],
             factors: list[float], *, on: str = "both", move: bool = False) -> dict[str, Any]:  # fmt: skip
    """One layer over `len(factors)` steps; `on` says whether input, gradient or both get the factor."""
    te, recipe, _ = engine()
    tokens, features_in, features_out = sizes
    maker = {
        "delayed": recipe.DelayedScaling,
        "current": recipe.Float8CurrentScaling,
        "block": recipe.Float8BlockScaling,
    }
    arguments = {key: recipe.Format[value] if key == "fp8_format" else value for key, value in kw.items()}
    scaling = maker[kind](**arguments)
    torch.manual_seed(1)
    layer = te.Linear(features_in, features_out, params_dtype=dtype, device="cuda")
    case = {"name": name, "kind": kind, "kw": kw, "dtype": str(dtype), "steps": []}
    case |= {"w": layer.weight.detach().cpu().clone(), "b": layer.bias.detach().cpu().clone()}
    for index, factor in enumerate(factors):
        x_factor = factor if on in ("both", "input") else 1.0
        g_factor = factor if on in ("both", "gradient") else 1.0
        x = scaled(torch.randn(tokens, features_in, device="cuda"), x_factor, dtype).requires_grad_()
        g = scaled(torch.randn(tokens, features_out, device="cuda") * 1e-2, g_factor, dtype)
        layer.zero_grad()
        step: dict[str, Any] = {"w": layer.weight.detach().cpu().clone()} if move else {}
        with fp8(te, scaling):
            y = layer(x)
        y.backward(g)
        step |= {"x": x.detach().cpu(), "g": g.cpu(), "y": y.detach().cpu(), "dx": x.grad.cpu()}
        step |= {"dw": layer.weight.grad.cpu(), "db": layer.bias.grad.cpu()} | state_of(layer)
        case["steps"].append(step)
        if move:
            with torch.no_grad():
                layer.weight.mul_(1.0 + 0.5 * (-1) ** index)
    return case


def linear_cases(ledger: Ledger) -> list[dict[str, Any]]:
    """All cases; one that this version cannot run becomes a problem in the ledger."""
    small, baseline = (16, 32, 48), [1.0, 2.0, 0.5, 4.0, 1.0, 1.0]
    wanted: list[tuple[str, str, dict[str, Any], tuple[int, int, int], list[float], dict[str, Any]]] = []
    for algorithm in ("max", "most_recent"):
        long = {"fp8_format": "HYBRID", "amax_history_len": 16, "amax_compute_algo": algorithm}
        short = {"fp8_format": "HYBRID", "amax_history_len": 3, "amax_compute_algo": algorithm}
        wanted.append((f"long history {algorithm}", "delayed", long, small, baseline, {}))
        for odd, factors in ODD_INPUTS.items():
            wanted.append((f"{odd} {algorithm}", "delayed", short, small, factors, {}))
        wanted.append((f"gradient range {algorithm}", "delayed", short, small, ODD_INPUTS["range"], {"on": "gradient"}))
        wanted.append((f"moving weight {algorithm}", "delayed", short, small, baseline, {"move": True}))
    margins = {"fp8_format": "E4M3", "amax_history_len": 2, "margin": 3}
    wanted.append(("e4m3 margin 3", "delayed", margins, small, baseline, {}))
    for fmt in ("HYBRID", "E4M3"):
        wanted.append((f"current {fmt}", "current", {"fp8_format": fmt}, small, baseline, {}))
        for odd, factors in ODD_INPUTS.items():
            wanted.append((f"current {odd} {fmt}", "current", {"fp8_format": fmt}, small, factors, {}))
        for sizes in ((16, 128, 128), (32, 256, 128), (16, 144, 80)):
            label = "x".join(str(size) for size in sizes)
            wanted.append((f"block {label} {fmt}", "block", {"fp8_format": fmt}, sizes, [1.0, 8.0], {}))
        wanted.append((f"block odd {fmt}", "block", {"fp8_format": fmt}, (16, 128, 128), ODD_INPUTS["odd"][:4], {}))
    cases = []
    for name, kind, kw, sizes, factors, more in wanted:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                cases.append(run_case(name, kind, kw, dtype, sizes, factors, **more))
            except Exception as error:  # noqa: BLE001 - a shape or format that TE refuses is a finding, too
                ledger.problem(f"{name} {dtype}", f"{type(error).__name__}: {str(error)[:300]}")
    return cases


def quantized(values: torch.Tensor, quantizer: Any) -> dict[str, torch.Tensor]:
    """Quantized values and scales of a quantized tensor, whatever TE calls them in this version."""
    made = quantizer(values)
    names = ("_data", "_scale_inv", "_transpose", "_rowwise_data", "_rowwise_scale_inv", "_columnwise_data")
    found = {name: getattr(made, name, None) for name in (*names, "_columnwise_scale_inv")}
    return {name: value.cpu() for name, value in found.items() if isinstance(value, torch.Tensor)}


def casts() -> dict[str, Any]:
    """What TE's own cast kernels give: delayed (scale 1 and 3.7), current and block, for both formats."""
    _, _, tex = engine()
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256).cuda()
    generator = torch.Generator("cuda").manual_seed(3)
    spread = torch.randn(32, 256, device="cuda", generator=generator)
    spread = spread * torch.exp2(torch.randint(-12, 12, spread.shape, device="cuda", generator=generator).float())
    spread[0, :128] = 0
    found: dict[str, Any] = {"every_bf16": "all 65536 bit patterns in order, [256, 256]", "spread": spread.cpu()}
    for name, kind in (("e4m3", tex.DType.kFloat8E4M3), ("e5m2", tex.DType.kFloat8E5M2)):
        for scale in (1.0, 3.7):
            amax = torch.zeros(1, device="cuda")
            maker = Float8Quantizer(torch.full((1,), scale, device="cuda"), amax, kind, columnwise=False)
            found[f"delayed {name} scale {scale} every_bf16"] = quantized(every, maker) | {"amax": amax.cpu()}
            found[f"delayed {name} scale {scale} spread"] = quantized(spread, maker)
        current = Float8CurrentScalingQuantizer(kind, device=torch.device("cuda"), columnwise=False)
        found[f"current {name} spread"] = quantized(spread, current)
        for dimension in (1, 2):
            for power in (True, False):
                maker = Float8BlockQuantizer(
                    kind, rowwise=True, columnwise=True, force_pow_2_scales=power, block_scaling_dim=dimension
                )
                label = f"block{dimension}d {name} {'power of two' if power else 'exact'} spread"
                found[label] = quantized(spread, maker)
    return found


def adapter_facts() -> dict[str, Any]:
    """Questions of our adapter: does a layer stay out of TE's global update when its buffer key is already set?"""
    te, recipe, _ = engine()
    from transformer_engine.pytorch import quantization

    state_manager = quantization.FP8GlobalStateManager
    scaling = recipe.DelayedScaling(amax_history_len=4)
    facts: dict[str, Any] = {}
    for claimed in (False, True):
        state_manager.reset()
        torch.manual_seed(0)
        layers = [te.Linear(32, 32, params_dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        for layer in layers:
            if claimed:
                layer.fp8_meta[state_manager.get_buffer_info()] = []
        for _ in range(2):
            x = torch.randn(16, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for layer in layers:
                with fp8(te, scaling):
                    x = layer(x)
            x.float().sum().backward()
        histories = [layer.fp8_meta["scaling_fwd"].amax_history[:, 0].tolist() for layer in layers]
        backward = [layer.fp8_meta["scaling_bwd"].amax_history[:, 0].tolist() for layer in layers]
        scales = [layer.fp8_meta["scaling_fwd"].scale.tolist() for layer in layers]
        facts["claimed" if claimed else "left to TE"] = {"fwd": histories, "bwd": backward, "scales": scales}
    state_manager.reset()
    return facts


def cached_weight() -> dict[str, Any]:
    """is_first_microbatch: the second micro-batch must use the first one's quantized values although the weight has
    changed.
    """
    te, recipe, _ = engine()
    layer = te.Linear(32, 32, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(16, 32, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for first in (True, False, True):
        with fp8(te, recipe.Float8CurrentScaling()):
            outputs.append(layer(x, is_first_microbatch=first).detach().float())
        with torch.no_grad():
            layer.weight.mul_(2.0)
    same = bool((outputs[0] == outputs[1]).all())
    return {"second equals first": same, "third over first": float(outputs[2].norm() / outputs[0].norm())}


def bound_slots() -> dict[str, Any]:
    """Do quantizers use scale and amax tensors that were put into them, and is the amax of two calls the larger one?"""
    te, recipe, _ = engine()
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    scaling = recipe.DelayedScaling(amax_history_len=1)
    layer = te.Linear(32, 32, params_dtype=torch.bfloat16, device="cuda")
    layer.fp8_meta[FP8GlobalStateManager.get_buffer_info()] = []
    slots = torch.zeros(2, 5, device="cuda")
    slots[0] = 2.0
    with fp8(te, scaling):
        layer.init_fp8_metadata(num_gemms=1)
    for key, first, count in (("scaling_fwd", 0, 3), ("scaling_bwd", 3, 2)):
        for index, quantizer in enumerate(layer.quantizers[key][:count]):
            column = slice(first + index, first + index + 1)
            quantizer.scale, quantizer.amax = slots[0, column], slots[1, column]
    facts: dict[str, Any] = {"quantizers": {key: len(value) for key, value in layer.quantizers.items()}}
    for factor in (3.0, 1.0):
        x = torch.full((16, 32), factor, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with fp8(te, scaling):
            y = layer(x)
        y.backward(torch.full_like(y, factor / 8))
        facts[f"amax after input {factor}"] = slots[1].tolist()
    facts["scales after"] = slots[0].tolist()
    facts["own scale of TE"] = layer.fp8_meta["scaling_fwd"].scale.tolist()
    slots[1].zero_()
    with torch.no_grad(), fp8(te, scaling):
        layer(x)
    facts["amax after a call without gradients"] = slots[1].tolist()
    with torch.no_grad():
        layer(x)
    with fp8(te, scaling):
        layer(x)
    facts["still bound after a call without FP8"] = (
        layer.quantizers["scaling_fwd"][0].scale.data_ptr() == slots.data_ptr()
    )
    return facts


def padded_rows() -> dict[str, Any]:
    """Rows of zeros below the tokens must not change outputs or gradients of the others."""
    te, recipe, _ = engine()
    found = {}
    for name, scaling in (("delayed", recipe.DelayedScaling()), ("current", recipe.Float8CurrentScaling())):
        torch.manual_seed(0)
        layer = te.Linear(64, 64, params_dtype=torch.bfloat16, device="cuda")
        x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
        x[21:] = 0
        g = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
        g[21:] = 0
        results = []
        for rows in (32, 48):
            layer.zero_grad()
            more = torch.nn.functional.pad(x, (0, 0, 0, rows - 32)).requires_grad_()
            with fp8(te, scaling):
                y = layer(more)
            y.backward(torch.nn.functional.pad(g, (0, 0, 0, rows - 32)))
            results.append((y[:21].detach(), more.grad[:21], layer.weight.grad.clone()))
        same = [bool((a == b).all()) for a, b in zip(*results, strict=True)]
        found[name] = dict(zip(("y", "dx", "dw"), same, strict=True))
    return found


def fused_layers() -> dict[str, Any]:
    """LayerNormLinear and LayerNormMLP against the unmodified modules: names, and how near in bf16 and in FP8."""
    te, recipe, _ = engine()
    torch.manual_seed(0)
    width, tokens = 128, 64
    norm = torch.nn.LayerNorm(width, device="cuda", dtype=torch.bfloat16)
    first = torch.nn.Linear(width, 4 * width, device="cuda", dtype=torch.bfloat16)
    second = torch.nn.Linear(4 * width, width, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    facts: dict[str, Any] = {}
    fused = te.LayerNormLinear(width, 4 * width, params_dtype=torch.bfloat16, device="cuda")
    facts["LayerNormLinear names"] = [name for name, _ in fused.named_parameters()]
    names = {"layer_norm_weight": norm.weight, "layer_norm_bias": norm.bias}
    for name, value in (names | {"weight": first.weight, "bias": first.bias}).items():
        setattr(fused, name, value)
    baseline = first(norm(x)).float()
    facts["LayerNormLinear bf16 error"] = float((fused(x).float() - baseline).norm() / baseline.norm())
    with fp8(te, recipe.Float8CurrentScaling()):
        facts["LayerNormLinear current error"] = float((fused(x).float() - baseline).norm() / baseline.norm())
    for activation, function in (
        ("gelu", lambda h: torch.nn.functional.gelu(h, approximate="tanh")),
        ("gelu", torch.nn.functional.gelu),
        ("relu", torch.relu),
    ):
        mlp = te.LayerNormMLP(width, 4 * width, params_dtype=torch.bfloat16, device="cuda", activation=activation)
        more = {"fc1_weight": first.weight, "fc1_bias": first.bias, "fc2_weight": second.weight}
        for name, value in (names | more | {"fc2_bias": second.bias}).items():
            setattr(mlp, name, value)
        baseline = second(function(first(norm(x)))).float()
        label = f"LayerNormMLP {activation} {getattr(function, '__name__', '')} bf16 error"
        facts[label] = float((mlp(x).float() - baseline).norm() / baseline.norm())
    facts["LayerNormMLP names"] = [name for name, _ in mlp.named_parameters()]
    return facts


def body(ledger: Ledger) -> None:
    cases = linear_cases(ledger)
    torch.save(cases, ledger.out / "te_golden_more.pt")
    ledger.record(
        "cases", [{"case": case["name"], "dtype": case["dtype"], "steps": len(case["steps"])} for case in cases]
    )
    ledger.record("te_golden_more.pt bytes", (ledger.out / "te_golden_more.pt").stat().st_size)
    kept = ledger.attempt("te_casts.pt", lambda: (torch.save(casts(), ledger.out / "te_casts.pt"), "written")[1])
    if kept:
        ledger.record("te_casts.pt bytes", (ledger.out / "te_casts.pt").stat().st_size)
    ledger.attempt("adapter: who updates the histories", adapter_facts)
    ledger.attempt("adapter: weight cache", cached_weight)
    ledger.attempt("adapter: bound slots", bound_slots)
    ledger.attempt("adapter: padded rows", padded_rows)
    ledger.attempt("adapter: fused layers", fused_layers)


if __name__ == "__main__":
    main("golden", body)
