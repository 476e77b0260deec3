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

// Puts stretches of memory past the caches, whole lines only: what a stretch has of a line at its end (its beginning, where a walk
// descends) waits for the next stretch to bring the rest. A line written in part would have to be read first.
struct alignas(64) LineWriter {
  static constexpr int64_t line = 64;
  char kept[line];
  char* at = nullptr;  // the line that waits; null: none
  int64_t begin, end;  // what is there of it

  // Lines on their way: one after the other, since more at once than the processor has room for would hold up everything behind them.
  struct Whole {
    char* to;
    const char* from;
    int64_t bytes;

    void put(int64_t most) {
      const int64_t end = smaller_of(bytes, most);
      for (int64_t i = 0; i < end; i += 4 * W) stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
      to += end, from += end, bytes -= end;
    }
  } whole;

  // `from` lies in its line as `to` does, with room for lines at both ends.
  __attribute__((noinline)) void put(char* to, char* from, int64_t bytes, bool descends) {
    int64_t first = reinterpret_cast<uintptr_t>(to) % line, last = first + bytes;
    to -= first, from -= first;
    const int64_t border = descends ? last / line * line : 0;
    if (at == to + border && (descends ? begin == last - border : end == first)) {
      __builtin_memcpy(from + border + begin, kept + begin, end - begin);
      descends ? last = border + end : first = begin;
    } else {
      close();
    }
    at = nullptr;
    const int64_t last_line = last / line * line;
    if (!descends && first != 0 && last >= line) __builtin_memcpy(to + first, from + first, line - first);
    if (descends && last != last_line && last_line != 0) __builtin_memcpy(to + last_line, from + last_line, last - last_line);
    const int64_t first_line = round_up(first, line);
    whole = {to + first_line, from + first_line, larger_of(0, last_line - first_line)};
    if (descends ? first != 0 || last < line : last != last_line) {
      const int64_t of = descends ? 0 : last_line;
      __builtin_memcpy(kept, from + of, line);
      at = to + of, begin = larger_of(0, first - of), end = smaller_of(line, last - of);
    }
  }
  void close() {
    if (at != nullptr) __builtin_memcpy(at + begin, kept + begin, end - begin);
    at = nullptr;
  }
};

struct alignas(64) RowForwardScratch {
  float dt[batch_steps], a[batch_steps], w[batch_steps], y[batch_steps], z[batch_steps];
  float B[kept_steps], C[kept_steps];  // copies of rows
  alignas(64) char out[4 * (batch_steps + block) + 2 * LineWriter::line];  // in the output's dtype
  Effect runs[batch_blocks];
  V entering[batch_blocks];
  const void *B_kept[kept_steps / batch_steps], *C_kept[kept_steps / batch_steps];  // whose, for each stretch
  LineWriter lines;
  struct {
    char* to;
    int64_t bytes;
    bool descends;
  } pending;  // in `out`, has yet to be put past the caches: a moment after it was written, or loads would wait for the stores

  void forget() {
    for (const void*& at : B_kept) at = nullptr;
    for (const void*& at : C_kept) at = nullptr;
    pending.bytes = lines.whole.bytes = 0;
    lines.at = nullptr;
  }
  // Where in `out` that lies in its cache line which will be put to `to`.
  char* place_of(const char* to) { return out + reinterpret_cast<uintptr_t>(to) % LineWriter::line; }
  void stream_pending() {
    if (pending.bytes != 0) lines.put(pending.to, place_of(pending.to), pending.bytes, pending.descends);
    pending.bytes = 0;
  }
};

// B or C for one state, as floats: `row`, but for what comes after the whole blocks, which is in `rest`, and zeros after that.
struct FoundRows {
  const float *row, *rest;
  int64_t stride;  // from one channel to the next; 0: they share it
};

// Steps [begin, begin + n) of a channel in one direction.
struct RowStretch {
  int64_t b, k, d, begin, n;
  bool first, last;       // of the directions that are summed into out
  float* state;           // (N), that enters and becomes the one that leaves
  const char *delta, *u;  // I/O dtype
  char* out;
  const float *bias, *skip, *A;  // null: 0, but for A

  int64_t whole() const { return n / block * block; }
  int64_t blocks() const { return divide_up(n, block); }
};

// The same steps of `count` consecutive channels: a stretch of a long row, or several short rows. What is said of the stretch is the
// first channel's.
struct RowBatch : RowStretch {
  int64_t count = 0;
  bool reversed = false;
  FoundRows B, C;
};

// The batches of a task in their order: channel by channel, in each the directions that are summed, in each its row in scan order.
struct RowWalk {
  const ScanForward& f;
  const int64_t end, first, last, parts = divide_up(f.sizes.length, batch_steps);
  const int64_t size = size_of(f.sizes.io), out_size = size_of(f.sizes.out);
  const int64_t delta_stride = f.delta.channel * size, u_stride = f.u.channel * size, out_stride = f.sizes.length * out_size;  // bytes
  const bool shares = W == 16 && f.sizes.length <= W * W / 2;  // several short rows to a square
  // Of the scratch memory a row takes this many blocks.
  const int64_t blocks = divide_up(smaller_of(f.sizes.length, batch_steps), block);
  const int64_t slots = shares ? blocks : round_up(blocks, square_blocks);
  const int64_t rows_together = first == last ? batch_blocks / slots : 1;
  float* const sum;  // (length): of the directions
  int64_t from = 0, until = parts, walked = 0;
  int64_t first_of_sum = first, last_of_sum = last;
  RowStretch row{};  // that is walked, all of it

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
    const auto parameter = [&](const void* of, int64_t i) { return of == nullptr ? nullptr : static_cast<const float*>(of) + i; };
    row.k = k;
    row.d = d;
    row.n = sizes.length;
    row.first = k == first_of_sum;
    row.last = k == last_of_sum;
    row.state = static_cast<float*>(f.last_state) + sequence * sizes.state;
    row.delta = at(f.delta);
    row.u = at(f.u);
    row.out = static_cast<char*>(f.out) + (sizes.shared ? row.b * sizes.channels + d : sequence) * out_stride;
    row.bias = parameter(f.delta_bias, channel);
    row.skip = parameter(f.D, channel);
    row.A = parameter(f.A, channel * sizes.state);
  }
  void leave_rows(int64_t count) {
    walked = from;
    if (row.k != last) return enter_row(row.k + 1, row.d);
    row.d += count;
    if (row.d == end) return;
    if (first != last) return enter_row(first, row.d);
    row.state += count * f.sizes.state;
    row.delta += count * delta_stride;
    row.u += count * u_stride;
    row.out += count * out_stride;
    if (row.bias != nullptr) row.bias += count;
    if (row.skip != nullptr) row.skip += count;
    row.A += count * f.sizes.state;
  }

  // No more channels than belong to one group.
  void share_group(const Projection& p, RowBatch& batch) const {
    if (p.constant || p.groups == 1) return;
    const int64_t channels = f.sizes.channels / p.groups;
    batch.count = smaller_of(batch.count, channels - row.d % channels);
  }

  void fill(RowBatch& batch) {
    batch.count = 0;
    if (row.d >= end) return;
    static_cast<RowStretch&>(batch) = row;
    batch.reversed = f.sizes.reversed(row.k);
    batch.count = smaller_of(rows_together, end - row.d);
    if (batch.count > 1) share_group(f.B, batch), share_group(f.C, batch);
    if (parts > 1) {
      batch.begin = (batch.reversed ? parts - 1 - walked : walked) * batch_steps;
      batch.n = smaller_of(batch_steps, row.n - batch.begin);
      batch.delta += batch.begin * size;
      batch.u += batch.begin * size;
      batch.out += batch.begin * out_size;
    }
    if (++walked == until) leave_rows(batch.count);
  }
};

// A row in another dtype, or the rest, is a copy in `spare`: none is made where it is `kept` there.
template <Dtype io>
inline FoundRows find_rows(const RowWalk& walk, const RowBatch& t, const Projection& p, int64_t n, float* spare, const void*& kept) {
  const ScanSizes& sizes = walk.f.sizes;
  if (p.constant) {
    const float* constants = static_cast<const float*>(p.data) + (t.k * sizes.channels + t.d) * sizes.state + n;
    const int64_t stride = walk.slots * block;
    for (int64_t i = 0; i < t.count; ++i) fill_row(spare + i * stride, constants[i * sizes.state], t.blocks() * block);
    return {spare, spare, stride};
  }
  const int64_t group = p.groups == 1 ? 0 : t.d / (sizes.channels / p.groups), whole = t.whole();
  const void* at = element(sizes.io, p.data, t.b * p.batch + t.k * p.direction + group * p.group + n * p.state + t.begin);
  const char* row = static_cast<const char*>(at);
  const bool copied = in_runs<io> || (sizes.length <= aligned_steps && reinterpret_cast<uintptr_t>(at) % 64 != 0);
  if (at != kept) {
    if (copied)
      for (int64_t j = 0; j < whole; j += block) load_block<io>(row + j * size_of(io)).to(spare + j);
    if (whole < t.n) load_part_of_block<io>(row + whole * size_of(io), t.n - whole).to(spare + whole);
    kept = at;
  }
  return {copied ? spare : reinterpret_cast<const float*>(row), spare, 0};
}

// Everything of a batch that differs from state to state.
template <Dtype io>
inline void find_state(const RowWalk& walk, RowBatch& batch, int64_t n, RowForwardScratch& s) {
  const int64_t part = walk.f.sizes.length <= kept_steps ? batch.begin / batch_steps : 0, at = part * batch_steps;
  batch.B = find_rows<io>(walk, batch, walk.f.B, n, s.B + at, s.B_kept[part]);
  batch.C = find_rows<io>(walk, batch, walk.f.C, n, s.C + at, s.C_kept[part]);
}

}  // namespace
}  // namespace dass::cpu
