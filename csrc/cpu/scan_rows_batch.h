// What the forward along rows works on at a time: a stretch of a long row, or several short rows, and where their numbers lie. The
// loops over a batch are in scan_rows_forward.h.
#pragma once

namespace dass::cpu {
namespace {

constexpr int64_t row_tile = 256;
constexpr int64_t streaming_elements = int64_t{1} << 18;  // of 4 bytes: from here on outputs bypass the caches
constexpr int64_t streaming_bytes = 4 * streaming_elements;
constexpr int64_t kept_steps = 8192;     // of B and C, as copies for several channels
constexpr int64_t aligned_steps = 4096;  // float32 rows up to this length are copied only to align them: a task has eight or more
constexpr int64_t batch_steps = 512, batch_blocks = batch_steps / block;

// float32 rows are worked on as they lie, and turned into runs where the scan needs them; rows of 16-bit numbers become runs as
// they are loaded.
template <Dtype io>
constexpr bool in_runs = io != Dtype::float32;

template <Dtype io>
inline Block load_block(const char* row) {
  if constexpr (in_runs<io>) return load_runs<io>(row);
  return Block::at(reinterpret_cast<const float*>(row));
}
// The beginning of a block, then zeros.
template <Dtype io>
inline Block load_part_of_block(const char* row, int64_t n) {
  if constexpr (in_runs<io>) {
    return load_part_of_runs(io, row, n);
  } else {
    const float* p = reinterpret_cast<const float*>(row);
    return {{load_clipped(p, n), load_clipped(p + W, n - W), load_clipped(p + 2 * W, n - 2 * W), load_clipped(p + 3 * W, n - 3 * W)}};
  }
}

// What has yet to be put past the caches: a moment after it was written, or loads would wait for the stores.
struct Pending {
  char* to;
  const char* from;
  int64_t bytes;
};

struct alignas(64) RowForwardScratch {
  float dt[batch_steps], a[batch_steps], w[batch_steps], y[batch_steps], z[batch_steps];
  float B[kept_steps], C[kept_steps];  // copies of rows
  char out[4 * batch_steps];  // in the output's dtype
  Effect runs[batch_blocks];
  V entering[batch_blocks];
  const void *B_kept[kept_steps / batch_steps], *C_kept[kept_steps / batch_steps];  // whose, for each stretch
  Pending pending[batch_blocks];
  int64_t pending_count;

  void forget() {
    for (const void*& at : B_kept) at = nullptr;
    for (const void*& at : C_kept) at = nullptr;
    pending_count = 0;
  }
  void stream_pending() {
    for (const Pending* p = pending; p < pending + pending_count; ++p) stream_bytes(p->to, p->from, p->bytes);
    pending_count = 0;
  }
};

// Steps [begin, begin + n) of one channel in one direction.
struct RowStretch {
  int64_t b, k, d, begin, n;
  int64_t slot, blocks;   // its blocks in the scratch memory
  bool first, last;       // of the directions that are summed into out
  float* state;           // (N), that enters and becomes the one that leaves
  const char *delta, *u;  // I/O dtype
  char* out;
  float bias, skip, exponent;
  const float *B, *C, *B_rest, *C_rest;  // as floats; _rest: where the steps after the whole blocks are, and zeros after those

  int64_t whole() const { return n / block * block; }
};

struct RowBatch {
  RowStretch stretches[batch_blocks];
  int64_t count = 0;
  bool reversed = false, shares = false;  // shares: several short rows to a square
};

// A row of B or C for one state of a stretch, as floats: `row`, but for what comes after the whole blocks, which is in `rest`.
struct FoundRow {
  const void* at;
  const float *row, *rest;
};

// A row in another dtype, or the rest, is a copy in `spare`: none is made where it was found `before`, or is `kept` there.
template <Dtype io>
inline FoundRow find_row(const ScanForward& f, const RowStretch& t, const Projection& p, int64_t n, const FoundRow& before,
                         float* spare, const void* kept) {
  const ScanSizes& sizes = f.sizes;
  const int64_t padded = t.blocks * block;
  if (p.constant) {
    fill_row(spare, static_cast<const float*>(p.data)[(t.k * sizes.channels + t.d) * sizes.state + n], padded);
    return {nullptr, spare, spare};
  }
  const int64_t group = p.groups == 1 ? 0 : t.d / (sizes.channels / p.groups);
  const void* at = element(sizes.io, p.data, t.b * p.batch + t.k * p.direction + group * p.group + n * p.state + t.begin);
  if (at == before.at) return before;
  const char* row = static_cast<const char*>(at);
  const bool copied = in_runs<io> || (sizes.length <= aligned_steps && reinterpret_cast<uintptr_t>(at) % 64 != 0);
  const int64_t whole = t.whole();
  if (at != kept) {
    if (copied)
      for (int64_t j = 0; j < whole; j += block) load_block<io>(row + j * size_of(io)).to(spare + j);
    if (whole < t.n) load_part_of_block<io>(row + whole * size_of(io), t.n - whole).to(spare + whole);
  }
  return {at, copied ? spare : reinterpret_cast<const float*>(row), spare};
}

// Everything of a batch that differs from state to state.
template <Dtype io>
inline void find_state(const ScanForward& f, RowBatch& batch, int64_t n, RowForwardScratch& s) {
  FoundRow B{}, C{};
  for (int64_t i = 0; i < batch.count; ++i) {
    RowStretch& t = batch.stretches[i];
    const int64_t part = f.sizes.length <= kept_steps ? t.begin / batch_steps : 0, at = part * batch_steps + t.slot * block;
    const bool again = i > 0 && t.k == (&t)[-1].k && t.begin == (&t)[-1].begin;  // the same steps of the next channel
    if (!again || f.B.constant || f.B.groups != 1) B = find_row<io>(f, t, f.B, n, B, s.B + at, i == 0 ? s.B_kept[part] : nullptr);
    if (!again || f.C.constant || f.C.groups != 1) C = find_row<io>(f, t, f.C, n, C, s.C + at, i == 0 ? s.C_kept[part] : nullptr);
    if (i == 0) s.B_kept[part] = B.at, s.C_kept[part] = C.at;
    t.B = B.row, t.B_rest = B.rest, t.C = C.row, t.C_rest = C.rest;
    t.exponent = static_cast<const float*>(f.A)[(t.k * f.sizes.channels + t.d) * f.sizes.state + n] * log2_e;
  }
}

// The batches of a task in their order: channel by channel, in each the directions that are summed, in each its row in scan order.
struct RowWalk {
  const ScanForward& f;
  const int64_t end, first, last, parts = divide_up(f.sizes.length, batch_steps);
  const int64_t size = size_of(f.sizes.io), out_size = size_of(f.sizes.out);
  const bool shares = W == 16 && f.sizes.length <= W * W / 2;
  float* const sum;  // (length): of the directions
  int64_t from = 0, until = parts, walked = 0;
  int64_t first_of_sum = first, last_of_sum = last;
  RowStretch row{};  // of the row that is walked: what its stretches share, and where it begins

  RowWalk(const ScanForward& f, int64_t b, int64_t d, int64_t end, int64_t first, int64_t last, float* sum)
      : f(f), end(end), first(first), last(last), sum(sum) {
    row.b = b;
    enter_row(first, d);
  }
  // Of one row in one direction a piece (pieces.h), whose states are kept apart.
  RowWalk(const ScanForward& f, int64_t b, int64_t d, int64_t k, int64_t piece, float* sum, float* state)
      : RowWalk(f, b, d, d + 1, k, k, sum) {
    constexpr int64_t of_piece = row_piece / batch_steps;
    from = walked = piece * of_piece;
    until = smaller_of(from + of_piece, parts);
    if (f.sizes.shared) first_of_sum = 0, last_of_sum = f.sizes.directions - 1;
    enter_row(k, d);
    row.state = state;
  }

  void enter_row(int64_t k, int64_t d) {
    const ScanSizes& sizes = f.sizes;
    const int64_t channel = k * sizes.channels + d, sequence = row.b * sizes.directions * sizes.channels + channel;
    const auto at = [&](const Sequence& of) {
      return static_cast<const char*>(of.data) + (row.b * of.batch + k * of.direction + d * of.channel) * size;
    };
    row.k = k;
    row.d = d;
    row.first = k == first_of_sum;
    row.last = k == last_of_sum;
    row.state = static_cast<float*>(f.last_state) + sequence * sizes.state;
    row.delta = at(f.delta);
    row.u = at(f.u);
    row.out = static_cast<char*>(f.out) + (sizes.shared ? row.b * sizes.channels + d : sequence) * sizes.length * out_size;
    enter_parameters();
  }
  void enter_parameters() {
    const int64_t channel = row.k * f.sizes.channels + row.d;
    row.bias = f.delta_bias == nullptr ? 0.0f : static_cast<const float*>(f.delta_bias)[channel];
    row.skip = f.D == nullptr ? 0.0f : static_cast<const float*>(f.D)[channel];
  }
  void leave_row() {
    walked = from;
    if (row.k != last) return enter_row(row.k + 1, row.d);
    if (++row.d == end) return;
    if (first != last) return enter_row(first, row.d);
    row.state += f.sizes.state;
    row.delta += f.delta.channel * size;
    row.u += f.u.channel * size;
    row.out += f.sizes.length * out_size;
    enter_parameters();
  }

  void fill(RowBatch& batch) {
    const int64_t L = f.sizes.length;
    int64_t count = 0;
    for (int64_t slot = 0; row.d < end;) {
      const bool reversed = f.sizes.reversed(row.k);
      const int64_t begin = (reversed ? parts - 1 - walked : walked) * batch_steps, n = smaller_of(batch_steps, L - begin);
      const int64_t blocks = divide_up(n, block), slots = shares ? blocks : round_up(blocks, square_blocks);
      if (slot + slots > batch_blocks || (slot != 0 && reversed != batch.reversed)) break;
      batch.reversed = reversed;
      RowStretch& t = batch.stretches[count++];
      t = row;
      t.begin = begin;
      t.n = n;
      t.slot = slot;
      t.blocks = blocks;
      t.delta += begin * size;
      t.u += begin * size;
      t.out += begin * out_size;
      slot += slots;
      if (++walked == until) leave_row();
    }
    batch.shares = shares;
    batch.count = count;
  }
};

}  // namespace
}  // namespace dass::cpu
