"""One scale for each row of an operand: what grouped products take, because it is known without looking at other rows.

    scale = format.max / amax of the row        0: 1;  an infinite scale: the largest finite fp32
    code  = RNE(clamp(x * scale))

A row holds one token, or one output of one expert, so no scale depends on how many tokens an expert was sent, nor on
what its neighbours look like. A row that holds inf or NaN gets scale_inv NaN: an overflow stays visible.

A product that sums over rows wants the columns of each expert instead, transposed. There `table` [3, E] int32 says
where the experts' rows lie (`Groups.table`): sums up to and with each expert of tiles, of rows, and of rows rounded up
to 16. Without a table the experts have equally many: x is [E, rows, columns], a stack of weights.
Source: torch._scaled_grouped_mm's row-wise scales; torchao's training of mixtures in float8.
"""

from __future__ import annotations

import torch

from ..formats import Format
from .cast import saturate
from .scaling import scale_from_amax


def quantize_rows(x: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized values of `x` [..., rows, columns] (any float dtype), contiguous, and scale_inv [..., rows] fp32."""
    values = x.detach().float()
    amax = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    scale, scale_inv = _scales(amax, fmt)
    return saturate(values * scale.unsqueeze(-1), fmt).contiguous(), scale_inv


def quantize_rows_measured(
    x: torch.Tensor, fmt: Format, table: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`quantize_rows`, and `column_amaxes` from the same read; rows of no expert have quantized values without
    meaning.
    """
    return quantize_rows(x, fmt), column_amaxes(x, table)


def column_amaxes(x: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """The amax of each column of each expert, fp32 [E, columns]; infinite where it is not finite, 0 without rows."""
    values = x.detach().float().abs()
    if table is None:
        amax = values.amax(1)
    else:
        places = owners(table, x.shape[0]).unsqueeze(1).expand_as(values)
        amax = values.new_zeros(table.shape[1] + 1, x.shape[1]).scatter_reduce_(0, places, values, "amax")[:-1]
    return torch.where(torch.isfinite(amax), amax, torch.full_like(amax, torch.inf))


def quantize_columns(
    x: torch.Tensor, amax: torch.Tensor, fmt: Format, table: torch.Tensor | None, room: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for each column of each expert, from its amax [E, columns]: values transposed, scale_inv [E, columns].

    x [E, rows, columns]     without a table: values [E, columns, rows]
    x [S, columns]           with one: [columns, room], the rows of each expert from a multiple of 16 on, zeros behind
                             them up to the next; what lies behind the last expert's means nothing
    """
    scale, scale_inv = _scales(amax, fmt)
    values = x.detach().float()
    if table is None:
        return saturate(values * scale.unsqueeze(1), fmt).transpose(1, 2).contiguous(), scale_inv
    owner = owners(table, x.shape[0])
    scale = torch.cat([scale, scale.new_ones(1, scale.shape[1])])
    quantized = saturate(values * scale[owner], fmt)
    begins = torch.cat([table.new_zeros(3, 1), table], 1).long()
    place = begins[2][owner] + torch.arange(x.shape[0], device=x.device) - begins[1][owner]
    place = torch.where(owner < table.shape[1], place, room)
    wide = quantized.new_zeros((room + 1, x.shape[1]), dtype=torch.uint8)
    wide.index_copy_(0, place, quantized.view(torch.uint8))
    return wide[:room].t().contiguous().view(quantized.dtype), scale_inv


def zero_tail(out: torch.Tensor, end: torch.Tensor) -> None:
    """Zeros in rows `end` (one int32, on the device) and later of `out` [rows, columns]."""
    out.masked_fill_((torch.arange(out.shape[0], device=out.device) >= end).unsqueeze(1), 0)


def zero_experts(out: torch.Tensor, ends: torch.Tensor) -> None:
    """Zeros in `out` [E, ., .] where an expert has no rows: `ends` [E] int32 are the sums of rows."""
    out.masked_fill_((ends == torch.cat([ends.new_zeros(1), ends[:-1]])).view(-1, 1, 1), 0)


def add_rows(x: torch.Tensor, bias: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`x` [S, columns] plus the row of `bias` [E, columns] of each one's expert; zeros for rows of none."""
    owner = owners(table, x.shape[0])
    out = x + bias.to(x.dtype)[owner.clamp(max=table.shape[1] - 1)]
    return out.masked_fill_((owner == table.shape[1]).unsqueeze(1), 0)


def sum_rows(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Sums of each expert's rows of `x` [S, columns]: fp32 [E, columns], 0 without rows."""
    found = torch.zeros(table.shape[1] + 1, x.shape[1], dtype=torch.float32, device=x.device)
    return found.index_add_(0, owners(table, x.shape[0]), x.float())[:-1]


def owners(table: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows] int64: the expert of each row, E for rows of none."""
    places = torch.arange(rows, device=table.device, dtype=torch.int32)
    return torch.searchsorted(table[1].contiguous(), places, right=True)


def _scales(amax: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scale_from_amax(amax, fmt)
    scale_inv = torch.reciprocal(scale)
    return scale, torch.where(torch.isfinite(amax), scale_inv, torch.full_like(scale_inv, torch.nan))
