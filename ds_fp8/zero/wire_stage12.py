"""ZeRO 1 and 2: a gradient slice goes to the rank that owns it, in FP8.

DeepSpeed's chain is reduce_ipg_grads -> average_tensor -> allreduce_and_scatter -> allreduce_bucket. average_tensor
cuts a full bucket into slices, each with the rank that owns it; from there on DeepSpeed all-reduces the bucket and
every rank copies its slices out. The methods below take over at the point where slices and owners are known:

    reduce_scatter, use_multi_rank_bucket_allreduce         allreduce_and_scatter
    reduce_scatter, not use_multi_rank_bucket_allreduce     allreduce_no_retain(rank=owner)
    not reduce_scatter                                      gradient_reduction_w_predivide
    not contiguous_gradients                                buffered_reduce_fallback, and its fp32-preserving
                                                            counterpart

With overlap_comm all of them run inside DeepSpeed's reduction stream; nothing here waits on the host.
Slices that another rank owns keep this rank's local values: as in DeepSpeed, nobody reads them afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ..comm.cut import adjacent, cut_by_owner, join
from .touched import touched
from .wire import GradientWire, reduce_bucket, spread_over

if TYPE_CHECKING:
    from .adapters.vocabulary import ZeroStage12 as Base
else:
    Base = object

TOUCHED = {
    "ZeroStage12": touched(
        overrides=(
            "_add_full_reduction_to_compact_grad_partition _buffered_reduce_fallback_preserving_fp32 "
            "allreduce_and_scatter allreduce_no_retain average_tensor buffered_reduce_fallback "
            "gradient_reduction_w_predivide"
        ),
        reads=(
            "_add_to_grad_partition_buffer _clear_previous_reduced_grads _get_compact_grad_partition_slice "
            "bit16_groups dp_process_group grad_start_offset gradient_average ipg_buckets overlap_comm "
            "param_to_partition_ids real_dp_process_group reduce_scatter reduction_stream sequence_parallel_size"
        ),
    ),
}

Fragment = tuple[int, Tensor, "Tensor | None"]
"""(owner rank in the group, flat view of the gradient, fp32 partition slice to add to or None)."""


class WireStage12(Base):
    """Mixin over `DeepSpeedZeroOptimizer`; `fp8_gradient_wire` is set when the instance is specialised."""

    fp8_gradient_wire: GradientWire
    _fp8_average = 1.0

    def average_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> None:
        """As DeepSpeed's, with the division by the world size moved into the fp32 sum: no pass and no rounding."""
        if not (self.reduce_scatter and self.gradient_average):
            super().average_tensor(tensor, communication_data_type)
            return
        self._fp8_average = self._fp8_mean_factor()
        try:
            with self.fp8_undivided():
                super().average_tensor(tensor, communication_data_type)
        finally:
            self._fp8_average = 1.0

    def allreduce_and_scatter(
        self,
        bucket: Sequence[Any],
        communication_data_type: torch.dtype,
        numel_per_bucket: int = 500000000,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
    ) -> None:
        fragments: list[Fragment] = []
        for ranks, tensor, *output in bucket:
            owners = [ranks] if isinstance(ranks, int) else sorted(ranks)
            if len(owners) != 1:  # Muon wants whole matrices on several ranks: an all-reduce in high precision
                super().allreduce_and_scatter(
                    bucket, communication_data_type, numel_per_bucket, log, divide, process_group
                )
                return
            fragments.append((owners[0], tensor, output[0] if output else None))
        self._fp8_reduce(fragments, process_group, self._fp8_factor(divide))

    def allreduce_no_retain(
        self,
        bucket: Sequence[Tensor],
        communication_data_type: torch.dtype,
        numel_per_bucket: int = 500000000,
        rank: int | None = None,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
        output_bucket: Sequence[Tensor | None] | None = None,
    ) -> None:
        if rank is None:
            super().allreduce_no_retain(
                bucket, communication_data_type, numel_per_bucket, rank, log, divide, process_group, output_bucket
            )
            return
        outputs = output_bucket or [None] * len(bucket)
        fragments = [(rank, tensor, output) for tensor, output in zip(bucket, outputs, strict=True)]
        self._fp8_reduce(fragments, process_group, self._fp8_factor(divide))

    def gradient_reduction_w_predivide(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        """reduce_scatter: false. Where the division stands (before, after, split) makes no difference in an fp32
        sum.
        """
        if tensor.numel() == 0:
            return tensor
        fragments: list[Fragment] = []
        start = 0
        for group_index, index_in_group, param_id in self.ipg_buckets[communication_data_type].params:
            numel = self.bit16_groups[group_index][index_in_group].numel()
            fragments.extend(self._fp8_owned_fragments(group_index, param_id, tensor.narrow(0, start, numel)))
            start += numel
        self._fp8_reduce(fragments, self.dp_process_group, self._fp8_factor(divide=True))
        return tensor

    def _add_full_reduction_to_compact_grad_partition(
        self, reduced_tensor: Tensor, communication_data_type: torch.dtype
    ) -> None:
        """Done by gradient_reduction_w_predivide already, from the fp32 sum instead of its 16-bit copy."""

    def buffered_reduce_fallback(
        self,
        rank: int | None,
        grads: Sequence[Tensor],
        communication_data_type: torch.dtype,
        elements_per_buffer: int = 500000000,
        log: Any = None,
    ) -> None:
        """contiguous_gradients: false. The gradients are separate tensors; owners are those of their parameters."""
        self._fp8_reduce_separate(grads, self.ipg_buckets[communication_data_type].params)

    def _buffered_reduce_fallback_preserving_fp32(
        self,
        grads: Sequence[Tensor],
        grad_params: Sequence[tuple[int, int, int]],
        communication_data_type: torch.dtype,
        elements_per_buffer: int,
    ) -> None:
        self._fp8_reduce_separate(grads, grad_params)

    def _fp8_reduce_separate(self, grads: Sequence[Tensor], grad_params: Sequence[tuple[int, int, int]]) -> None:
        accelerator = get_accelerator()
        stream = accelerator.current_stream()
        if self.overlap_comm:
            # As DeepSpeed: gradients of the bucket before may go once its reduction is done.
            if not accelerator.resolves_data_dependency():
                accelerator.synchronize()
            self._clear_previous_reduced_grads()
            stream = self.reduction_stream
        by_kind: dict[Any, list[Fragment]] = {}
        for grad, (group_index, _, param_id) in zip(grads, grad_params, strict=True):
            key = (self.real_dp_process_group[group_index], grad.dtype)
            fragments = by_kind.setdefault(key, [])
            fragments.extend(self._fp8_owned_fragments(group_index, param_id, grad.view(-1)))
        with accelerator.stream(stream):
            for (group, _), fragments in by_kind.items():
                self._fp8_reduce(fragments, group, self._fp8_factor(divide=True))

    def _fp8_owned_fragments(self, group_index: int, param_id: int, grad: Tensor) -> Iterator[Fragment]:
        """Cut one flat gradient at the partition boundaries that it straddles."""
        starts = sorted(
            (self.grad_start_offset[group_index][owner][param_id], owner)
            for owner in self.param_to_partition_ids[group_index][param_id]
        )
        stops = [start for start, _ in starts[1:]] + [grad.numel()]
        for (start, owner), stop in zip(starts, stops, strict=True):
            output = self._get_compact_grad_partition_slice(group_index, owner, param_id, stop - start)
            yield owner, grad[int(start) : int(stop)], output

    def _fp8_mean_factor(self) -> float:
        return float(self.sequence_parallel_size) / dist.get_world_size(group=self.dp_process_group)

    def _fp8_factor(self, divide: bool) -> float:
        """Factor on the sum: what average_tensor left to us, or the mean where the caller asks for one."""
        return self._fp8_mean_factor() if divide and self.gradient_average else self._fp8_average

    def _fp8_reduce(self, fragments: Sequence[Fragment], group: Any, average: float) -> None:
        """Send every fragment to its owner; write the own ones back, and add them to their partition."""
        group = self.dp_process_group if group is None else group
        world_size, rank = dist.get_world_size(group=group), dist.get_rank(group=group)
        own = [(tensor, output) for owner, tensor, output in fragments if owner == rank]
        adds = any(output is not None for _, output in own)
        # The sums go straight into the own fragments, where those are one piece and nobody wants them in fp32 too.
        together = None if adds or not own else adjacent([tensor for tensor, _ in own])

        def deliver(start: int, part: Tensor) -> None:
            for number, offset, values in spread_over([tensor for tensor, _ in own], start, part):
                tensor, output = own[number]
                if output is not None:
                    self._add_to_grad_partition_buffer(output[offset : offset + values.numel()], values)
                tensor[offset : offset + values.numel()].copy_(values)

        if world_size == 1 and average == 1.0:
            # The sum of one rank is its own gradient, in place already: fp32 and back would be three passes for no bit.
            for tensor, output in own:
                if output is not None:
                    self._add_to_grad_partition_buffer(output, tensor)
        else:
            cut = cut_by_owner(tuple((owner, tensor.numel()) for owner, tensor, _ in fragments), world_size)
            where: dict[str, Any] = {"deliver": deliver} if together is None else {"out": together}
            bucket = join([tensor for _, tensor, _ in fragments])
            reduce_bucket(bucket, cut, self.fp8_gradient_wire, group, average=average, **where)
        if self.overlap_comm and not get_accelerator().resolves_data_dependency():
            for _, tensor, _ in fragments:
                tensor.record_stream(self.reduction_stream)
