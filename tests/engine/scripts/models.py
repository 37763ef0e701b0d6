"""Models of unusual shape: layers used twice, written to in place, hooked, patched, parametrized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.script_jobs import WIDTH, Mlp, data, loss_of, norm, script, take, train


@script()
def one_layer_used_many_times(make: Any, rank: int) -> Any:
    class Recurrent(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = torch.zeros_like(x)
            for _ in range(5):
                state = torch.tanh(self.enc(x) + self.mid(state))
            return self.dec(state)

    return train(make(Recurrent()), range(4))


@script()
def two_modules_share_a_layer(make: Any, rank: int) -> Any:
    model = Mlp()
    model.dec = model.enc
    return train(make(model), range(4))


@script()
def attention_and_its_fast_path(make: Any, rank: int) -> Any:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
            self.pool = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.block(x[None])
            return self.out(self.pool(hidden, hidden, hidden, need_weights=False)[0][0])

    engine = make(Attention())
    found = train(engine, range(3))
    engine.eval()
    with torch.no_grad():
        found.append(loss_of(engine, data(engine, 9)).item())
    with torch.inference_mode():
        found.append(loss_of(engine, data(engine, 9)).item())
    engine.train()
    return found + train(engine, range(3, 5))


@script()
def outputs_written_in_place(make: Any, rank: int) -> Any:
    class InPlace(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = F.relu(self.enc(x), inplace=True)
            hidden = F.dropout(self.mid(hidden), 0.0, self.training, inplace=True)
            hidden[:, :8] += 1
            hidden.mul_(0.5).masked_fill_(hidden > 3, 3)
            first, second = self.dec(hidden).chunk(2, dim=1)
            return torch.cat([first, second * 2], 1)

    return train(make(InPlace()), range(4))


@script(not_in=(3,))
def hooks_of_every_kind(make: Any, rank: int) -> Any:
    """Hooks of torch on layers, on weights, on outputs; a full backward hook that changes the gradient."""
    model, seen = Mlp(), []
    model.mid.register_forward_hook(lambda module, args, output: output * 2)
    model.enc.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    model.dec.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))
    engine = make(model)
    model.mid.weight.register_hook(lambda gradient: seen.append(norm(gradient)))
    return train(engine, range(4)), len(seen)


@script()
def patched_forward(make: Any, rank: int) -> Any:
    """Accelerate's `add_hook_to_module` puts another forward on the instance; a script does it by hand."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):
        def post_forward(self, module: Any, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    model = Mlp()
    hooks.add_hook_to_module(model.mid, Doubles())
    engine = make(model)
    found = train(engine, range(2))
    hooks.remove_hook_from_module(model.mid)
    original = model.dec.forward
    model.dec.forward = lambda x: original(x) + x
    return found + train(engine, range(2, 4))


@script(not_in=(3,))
def parametrized_weights(make: Any, rank: int) -> Any:
    from torch.nn.utils import parametrizations

    model = Mlp()
    parametrizations.weight_norm(model.mid)
    parametrizations.weight_norm(model.dec, dim=1)
    return train(make(model), range(4))


@script()
def checkpointed_in_segments(make: Any, rank: int) -> Any:
    from torch.utils.checkpoint import checkpoint_sequential

    class Segments(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential([self.enc, self.mid, self.dec], 2, x, use_reentrant=False)

    return train(make(Segments()), range(4))


@script(not_in=(3,))
def generates_with_a_cache(make: Any, rank: int) -> Any:
    """Between two steps, on one rank alone."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    engine, found = make(model), []
    engine.train()
    for step in range(4):
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step)).to(engine.device)
        found.append(take(engine, engine(input_ids=tokens, labels=tokens).loss))
        if step == 1 and rank == 0:
            engine.eval()
            made = engine.module.generate(tokens[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert made.shape == (2, 10)
            engine.train()
        torch.distributed.barrier()
    return found
