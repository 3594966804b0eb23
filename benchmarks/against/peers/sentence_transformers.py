"""sentence-transformers, fp32 on torch: what most people run. Arguments: MODEL_DIR."""

import sys

from benchmarks.against.peers.answering import BATCH, answer
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], device="cpu")
answer(lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False))
