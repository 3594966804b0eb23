// The arithmetic of the playground: numbers in, numbers out, nothing of the page.

/** The float32 (or, as *kind* says, int32) numbers in little-endian base64. */
export function decode(base64, kind = Float32Array) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  return new kind(bytes.buffer);
}

/** One item of `/embeddings` as arrays: dense, sparse (a Map by token id), multi (an array of rows). */
export function readItem({ embedding, sparse_embedding: sparse, multi_embedding: multi }) {
  const item = { dense: embedding ? decode(embedding) : undefined };
  if (sparse) {
    const weights = decode(sparse.values);
    item.sparse = new Map(Array.from(decode(sparse.indices, Int32Array), (id, i) => [id, weights[i]]));
  }
  if (multi) {
    const [rows, width] = multi.shape;
    const numbers = decode(multi.data);
    item.multi = Array.from({ length: rows }, (_, i) => numbers.subarray(i * width, (i + 1) * width));
  }
  return item;
}

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function normalise(vector) {
  const length = Math.sqrt(dot(vector, vector)) || 1;
  return vector.map((value) => value / length);
}

/** Which row of *passage* each row of *query* is nearest to, and how near. */
export function matches(query, passage) {
  return query.map((row) => {
    const scores = passage.map((other) => dot(row, other));
    const score = Math.max(...scores);
    return { match: scores.indexOf(score), score };
  });
}

/** Similarities as BGE-M3's authors define them: cosine, shared words, and ColBERT's mean of maxima. */
export const SIMILARITY = {
  dense: (a, b) => dot(a.dense, b.dense) / Math.sqrt(dot(a.dense, a.dense) * dot(b.dense, b.dense)),
  sparse: (a, b) => {
    let sum = 0;
    for (const [id, weight] of a.sparse) sum += weight * (b.sparse.get(id) ?? 0);
    return sum;
  },
  multi: (a, b) => {
    const found = matches(a.multi, b.multi);
    return found.reduce((sum, { score }) => sum + score, 0) / found.length;
  },
};

/** The matrix of *kind*; "fused" is the mean of all that *weights* names, by those weights. */
export function similarities(items, kind, weights) {
  const parts = kind === "fused" ? Object.entries(weights) : [[kind, 1]];
  const total = parts.reduce((sum, [, weight]) => sum + weight, 0) || 1;
  return items.map((a) => items.map((b) =>
    parts.reduce((sum, [name, weight]) => sum + weight * SIMILARITY[name](a, b), 0) / total));
}

/**
 * The first two principal components of *vectors*, as [x, y] within -1 … 1 by one common scale.
 *
 * Power iteration, the second component held orthogonal to the first: 2,000 vectors of 1,024 numbers
 * take under a second, and no matrix of them is made.
 */
export function pca(vectors) {
  const width = vectors[0].length;
  const mean = new Float64Array(width);
  for (const vector of vectors) vector.forEach((value, j) => (mean[j] += value / vectors.length));
  const rows = vectors.map((vector) => Float64Array.from(vector, (value, j) => value - mean[j]));
  const components = [];
  while (components.length < 2) {
    let axis = normalise(Float64Array.from(mean, (_, j) => Math.sin(j + 1 + components.length)));
    for (let round = 0; round < 100; round++) {
      let next = new Float64Array(width);
      for (const row of rows) {
        const along = dot(row, axis);
        for (let j = 0; j < width; j++) next[j] += along * row[j];
      }
      for (const earlier of components) {
        const along = dot(next, earlier);
        for (let j = 0; j < width; j++) next[j] -= along * earlier[j];
      }
      next = normalise(next);
      const change = 1 - Math.abs(dot(next, axis));
      axis = next;
      if (change < 1e-9) break;
    }
    components.push(axis);
  }
  const points = rows.map((row) => components.map((axis) => dot(row, axis)));
  const scale = Math.max(...points.flat().map(Math.abs)) || 1;
  return points.map((point) => point.map((value) => value / scale));
}
