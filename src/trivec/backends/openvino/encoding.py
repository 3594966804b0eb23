"""A batch through a session: rows planned, packed, run, and read out in the order given."""

import numpy as np

from trivec.backends.openvino.packing import PackedRow, pack_row
from trivec.backends.openvino.rows import Row, plan_rows
from trivec.backends.openvino.session import Session
from trivec.core.types import Batch, Float32Array, SparseVector, Vectors
from trivec.models.pooling import HiddenRows, Readout


class BatchEncoder:
    """One model's way from a batch to its vectors."""

    def __init__(self, session: Session, readout: Readout, *, position_offset: int) -> None:
        self._session = session
        self._readout = readout
        self._position_offset = position_offset

    @property
    def slot_count(self) -> int:
        return self._session.slot_count

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        """Vectors of *batch*, one entry a sequence; on the thread that owns *slot*."""
        whole = self._readout.needs_all_tokens(batch.outputs)  # [sequences]
        rows = plan_rows(np.diff(batch.cu_seqlens))
        parts = []
        for row in rows:
            packed = pack_row(
                batch,
                row,
                whole=whole,
                position_offset=self._position_offset,
                buffers=self._session.buffers(slot),
            )
            parts.append(self._read(batch, row, packed, slot=slot))
        return _in_order(rows, parts) if len(parts) != 1 or len(batch) != 1 else parts[0]

    def _read(self, batch: Batch, row: Row, packed: PackedRow, *, slot: int) -> Vectors:
        hidden = self._session.hidden(packed.inputs, slot=slot)
        return self._readout.vectors(
            HiddenRows(
                hidden=hidden[: len(packed.kept_token_ids)],
                token_ids=packed.kept_token_ids,
                cu_seqlens=packed.kept_starts,
                outputs=batch.outputs[row.members],
            )
        )


def _in_order(rows: list[Row], parts: list[Vectors]) -> Vectors:
    """One `Vectors` in the batch's own order from those of its rows."""
    count = sum(len(part) for part in parts)
    width = parts[0].dense.shape[1] if parts else 0
    dense = np.empty((count, width), np.float32)  # [sequences, dimensions]
    sparse: list[SparseVector | None] = [None] * count
    multi: list[Float32Array | None] = [None] * count
    for row, part in zip(rows, parts, strict=True):
        dense[row.members] = part.dense
        for place, i in enumerate(row.members.tolist()):
            sparse[i] = part.sparse[place]
            multi[i] = part.multi[place]
    return Vectors.of(dense, tuple(sparse), tuple(multi))
