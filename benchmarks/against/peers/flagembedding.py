"""FlagEmbedding, the home of BGE-M3, fp32 on torch; dense vectors only. Arguments: MODEL_DIR."""

import sys

from benchmarks.against.peers.answering import BATCH, answer
from FlagEmbedding import BGEM3FlagModel

model = BGEM3FlagModel(sys.argv[1], use_fp16=False, devices="cpu")
answer(lambda texts: model.encode(list(texts), batch_size=BATCH, max_length=8192)["dense_vecs"])
