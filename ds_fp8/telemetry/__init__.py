"""What a job in FP8 should be able to say about itself: ranges used, overflow, flush to zero, bytes on the wire.

A `Reading` is one operand of one layer at one step. Aggregates of all readings (about twenty numbers) go to DeepSpeed's
own monitor, so TensorBoard, W&B, CSV and Comet show them; every reading goes to a JSONL file, the journal; and alarms
name the layer and the key of the JSON to change. Nothing here needs torch: `engine.watch` brings the numbers.
"""

from __future__ import annotations

from .aggregate import aggregate
from .alarms import Alarm, find_alarms
from .journal import Journal, read_journal
from .reading import Reading

__all__ = ["Alarm", "Journal", "Reading", "aggregate", "find_alarms", "read_journal"]
