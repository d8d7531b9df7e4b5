// Per-sample convolution weight gradients on contiguous channels, without a layout conversion.
//
// The weight gradient at (output channel, input channel, tap) is a dot product over positions of
// one gradient row and one shifted input row. A block of positions of all channels is packed once
// so that
//   - a stride becomes one packed copy per residue ("phase") of the tap offset, hence every tap is
//     a plain shift of a packed row, and
//   - the rows of a plane lie at one common pitch with zeros in the gaps, hence a whole plane is
//     one contiguous run and a shift may run across row ends.
// Tiles of (up to) 4 output channels x 6 (input channel, tap) pairs then stay in registers over the
// block.
#include "dpkernels/conv.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/buffer.h"
#include "cpu/conv_tile.h"

namespace dpkernels::cpu {
namespace {

using std::int64_t;

// Positions of a block: long enough to hide a tile's horizontal sums, short enough for the second
// level of cache (measured: 2560 to 5120 are alike on Zen 4).
constexpr int64_t kBlockPositions = 3600;
// Floats of packed input at a time: with the packed gradients they stay in the second level.
constexpr int64_t kPackedInputs = 128 * 1024;

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

// One axis of the packed input: tap k reads phase (k * dilation) % stride at a fixed shift.
struct PackedAxis {
    int64_t size, stride, padding, dilation, kernel, output;
    int64_t phases, max_shift;

    PackedAxis() = default;
    PackedAxis(const ConvGeometry& g, int axis)
        : size(g.input[axis]),
          stride(g.stride[axis]),
          padding(g.padding[axis]),
          dilation(g.dilation[axis]),
          kernel(g.kernel[axis]),
          output(g.output[axis]),
          phases(1),
          max_shift(0) {
        for (int64_t tap = 0; tap < kernel; ++tap) {
            phases = std::max(phases, phase(tap) + 1);
            max_shift = std::max(max_shift, shift(tap));
        }
    }

    int64_t phase(int64_t tap) const { return tap * dilation % stride; }
    int64_t shift(int64_t tap) const { return tap * dilation / stride; }
    int64_t source(int64_t at, int64_t phase) const { return at * stride + phase - padding; }
    int64_t first_inside(int64_t phase) const {
        return std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, padding - phase), stride));
    }
    int64_t end_inside(int64_t phase) const {
        return std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, size + padding - phase), stride));
    }

    // Distance of packed rows along this axis: the zeros after one row double as those before the
    // next.
    int64_t pitch() const {
        const int64_t extent = output + max_shift;
        int64_t shared = extent - output;
        for (int64_t each = 0; each < phases; ++each)
            shared =
                std::min({shared, first_inside(each), extent - std::min(extent, end_inside(each))});
        return extent - shared;
    }
};

struct Block {
    int64_t z, y, planes, rows;  // output planes [z, z + planes), rows [y, y + rows)
};

// Layout of the packed operands of one block.
struct Layout {
    int64_t pitch;          // floats per row
    int64_t run;            // floats per gradient plane, multiple of kLanes
    int64_t grad_channel;   // floats per gradient channel
    int64_t input_plane;    // floats per input plane of one phase
    int64_t input_phase;    // floats per phase
    int64_t input_channel;  // floats per input channel
};

// Rows are packed in ascending order, so that these two may write up to a vector past their end:
// the next row, or the zeros after the last one, come later.
void zero_past(float* target, int64_t count) {
    for (int64_t at = 0; at < count; at += kLanes) store(target + at, Floats{});
}

void copy_row_past(const float* source, int64_t stride, int64_t count, float* target) {
    int64_t at = 0;
    if (stride == 1) {
        for (; at + kLanes <= count; at += kLanes) store(target + at, load(source + at));
        if (at > 0) {
            store(target + count - kLanes, load(source + count - kLanes));
            return;
        }
    } else if (stride == 2) {
        for (; at + kLanes < count; at += kLanes)
            store(target + at, even_lanes(load(source + 2 * at), load(source + 2 * at + kLanes)));
    }
    for (; at < count; ++at) target[at] = source[at * stride];
}

class Worker {
public:
    Worker(const ConvGeometry& geometry, const float* input, const float* grad_output,
           float* grad_sample)
        : g_(geometry), input_(input), grad_output_(grad_output), grad_sample_(grad_sample) {
        for (int axis = 0; axis < 3; ++axis) axes_[axis] = PackedAxis(geometry, axis);
        pitch_ = axes_[2].pitch();
        taps_ = g_.kernel[0] * g_.kernel[1] * g_.kernel[2];
        channels_in_ = g_.channels_in / g_.groups;
        channels_out_ = g_.channels_out / g_.groups;
        choose_block();
        const Layout widest = layout({0, 0, block_planes_, block_rows_});
        block_inputs_ = std::clamp<int64_t>(kPackedInputs / widest.input_channel, 1, channels_in_);
    }

    // Writes grad_sample[sample, channels first .. last of the group].
    void run(int64_t sample, int64_t group, int64_t first, int64_t last) const {
        thread_local AlignedBuffer packed_grads, packed_inputs;
        std::vector<int64_t> offsets;
        const Layout widest = layout({0, 0, block_planes_, block_rows_});
        float* grads = packed_grads.at_least((last - first) * widest.grad_channel + kLanes);
        float* inputs =
            packed_inputs.at_least(block_inputs_ * widest.input_channel + slack() + kLanes);
        const int64_t row_size = channels_in_ * taps_;
        const int64_t first_out = group * channels_out_ + first;
        float* result = grad_sample_ + (sample * g_.channels_out + first_out) * row_size;
        for (int64_t channel = 0; channel < channels_in_; channel += block_inputs_) {
            const int64_t count = std::min(block_inputs_, channels_in_ - channel);
            for (int64_t z = 0; z < g_.output[0]; z += block_planes_)
                for (int64_t y = 0; y < g_.output[1]; y += block_rows_) {
                    const Block block = {z, y, std::min(block_planes_, g_.output[0] - z),
                                         std::min(block_rows_, g_.output[1] - y)};
                    const Layout at = layout(block);
                    for (int64_t out = 0; out < last - first; ++out)
                        pack_grad(sample, first_out + out, block, at,
                                  grads + out * at.grad_channel);
                    for (int64_t in = 0; in < count; ++in)
                        pack_input(sample, group * channels_in_ + channel + in, block, at,
                                   inputs + in * at.input_channel);
                    zero_past(inputs + count * at.input_channel, slack());
                    list_columns(count, at, offsets);
                    multiply(block, at, grads, last - first, inputs, offsets, count * taps_,
                             z > 0 || y > 0, result + channel * taps_);
                }
        }
    }

private:
    // The block that packs the fewest floats in all, halos and padding included.
    void choose_block() {
        int64_t fewest = -1;
        for (int64_t cuts = 1; cuts <= g_.output[1]; ++cuts) {
            const int64_t rows = ceil_div(g_.output[1], cuts);
            const int64_t most =
                std::max<int64_t>(1, kBlockPositions / round_up(rows * pitch_, kLanes));
            const int64_t planes = ceil_div(g_.output[0], ceil_div(g_.output[0], most));
            const Layout at = layout({0, 0, planes, rows});
            const int64_t blocks = cuts * ceil_div(g_.output[0], planes);
            const int64_t packed = blocks * (at.input_channel + at.grad_channel);
            const bool fits = rows * pitch_ <= kBlockPositions || rows == 1;
            if (fits && (fewest < 0 || packed < fewest)) {
                fewest = packed;
                block_rows_ = rows;
                block_planes_ = planes;
            }
        }
    }

    // A run reads past a channel's last row: by its alignment, the shift of the last tap and a gap.
    int64_t slack() const { return kLanes + axes_[2].max_shift; }

    Layout layout(const Block& block) const {
        Layout at;
        at.pitch = pitch_;
        at.run = round_up(block.rows * pitch_, kLanes);
        at.grad_channel = block.planes * at.run;
        at.input_plane = (block.rows + axes_[1].max_shift) * pitch_;
        at.input_phase = (block.planes + axes_[0].max_shift) * at.input_plane;
        at.input_channel = axes_[0].phases * axes_[1].phases * axes_[2].phases * at.input_phase;
        return at;
    }

    void pack_grad(int64_t sample, int64_t channel, const Block& block, const Layout& at,
                   float* target) const {
        const std::array<int64_t, 5>& stride = g_.grad_stride;
        const float* source = grad_output_ + sample * stride[0] + channel * stride[1] +
                              block.z * stride[2] + block.y * stride[3];
        const int64_t width = g_.output[2], gap = at.pitch - width;
        for (int64_t plane = 0; plane < block.planes; ++plane, target += at.run) {
            float* row_target = target;
            for (int64_t row = 0; row < block.rows; ++row, row_target += at.pitch) {
                copy_row_past(source + plane * stride[2] + row * stride[3], stride[4], width,
                              row_target);
                zero_past(row_target + width, gap);
            }
            zero_past(row_target, target + at.run - row_target);
        }
    }

    void pack_input(int64_t sample, int64_t channel, const Block& block, const Layout& at,
                    float* target) const {
        const std::array<int64_t, 5>& stride = g_.input_stride;
        const float* source = input_ + sample * stride[0] + channel * stride[1];
        const int64_t planes = block.planes + axes_[0].max_shift;
        const int64_t rows = block.rows + axes_[1].max_shift;
        for (int64_t pz = 0; pz < axes_[0].phases; ++pz)
            for (int64_t py = 0; py < axes_[1].phases; ++py)
                for (int64_t px = 0; px < axes_[2].phases; ++px) {
                    const int64_t begin = std::min(axes_[2].first_inside(px), at.pitch);
                    const int64_t end = std::clamp(axes_[2].end_inside(px), begin, at.pitch);
                    for (int64_t plane = 0; plane < planes; ++plane) {
                        const int64_t z = axes_[0].source(block.z + plane, pz);
                        for (int64_t row = 0; row < rows; ++row, target += at.pitch) {
                            const int64_t y = axes_[1].source(block.y + row, py);
                            if (z < 0 || z >= g_.input[0] || y < 0 || y >= g_.input[1]) {
                                zero_past(target, at.pitch);
                                continue;
                            }
                            zero_past(target, begin);
                            copy_row_past(source + z * stride[2] + y * stride[3] +
                                              axes_[2].source(begin, px) * stride[4],
                                          stride[4] * axes_[2].stride, end - begin, target + begin);
                            zero_past(target + end, at.pitch - end);
                        }
                    }
                }
    }

    // Where the packed input of every weight column (input channel * taps + tap) begins.
    void list_columns(int64_t channels, const Layout& at, std::vector<int64_t>& offsets) const {
        offsets.clear();
        for (int64_t channel = 0; channel < channels; ++channel)
            for (int64_t tz = 0; tz < g_.kernel[0]; ++tz)
                for (int64_t ty = 0; ty < g_.kernel[1]; ++ty)
                    for (int64_t tx = 0; tx < g_.kernel[2]; ++tx)
                        offsets.push_back(channel * at.input_channel +
                                          phase(tz, ty, tx) * at.input_phase +
                                          axes_[0].shift(tz) * at.input_plane +
                                          axes_[1].shift(ty) * at.pitch + axes_[2].shift(tx));
        offsets.resize(round_up(channels * taps_, kTileColumns), offsets.back());
    }

    int64_t phase(int64_t tz, int64_t ty, int64_t tx) const {
        const int64_t plane_phase = axes_[0].phase(tz) * axes_[1].phases + axes_[1].phase(ty);
        return plane_phase * axes_[2].phases + axes_[2].phase(tx);
    }

    // result[out, column] = or += gradient rows . input rows over the block.
    void multiply(const Block& block, const Layout& at, const float* grads, int64_t outputs,
                  const float* inputs, const std::vector<int64_t>& offsets, int64_t columns,
                  bool accumulate, float* result) const {
        using MultiplyTile = void (*)(const Tile&, int, bool, float*, int64_t);
        static constexpr MultiplyTile by_rows[4] = {multiply_tile<1>, multiply_tile<2>,
                                                    multiply_tile<std::min(3, kTileRows)>,
                                                    multiply_tile<kTileRows>};
        const int64_t row_size = channels_in_ * taps_;
        Tile tile;
        tile.grad_plane = at.run;
        tile.input_plane = at.input_plane;
        tile.planes = block.planes;
        tile.length = at.run;
        for (int64_t out = 0; out < outputs; out += kTileRows) {
            const int64_t rows = std::min<int64_t>(kTileRows, outputs - out);
            for (int64_t row = 0; row < rows; ++row)
                tile.grads[row] = grads + (out + row) * at.grad_channel;
            const MultiplyTile multiply_rows = by_rows[rows - 1];
            for (int64_t column = 0; column < columns; column += kTileColumns) {
                for (int each = 0; each < kTileColumns; ++each)
                    tile.inputs[each] = inputs + offsets[column + each];
                const int used =
                    static_cast<int>(std::min<int64_t>(kTileColumns, columns - column));
                multiply_rows(tile, used, accumulate, result + out * row_size + column, row_size);
            }
        }
    }

    ConvGeometry g_;
    const float* input_;
    const float* grad_output_;
    float* grad_sample_;
    PackedAxis axes_[3];
    int64_t pitch_, taps_, channels_in_, channels_out_;
    int64_t block_rows_, block_planes_, block_inputs_;
};

}  // namespace

void conv_grad_sample(const float* input, const float* grad_output, float* grad_sample,
                      const ConvGeometry& geometry, Launch launch) {
    const Worker worker(geometry, input, grad_output, grad_sample);
    const int64_t channels = geometry.channels_out / geometry.groups;
    const int64_t independent = geometry.batch * geometry.groups;
    const int64_t tiles = ceil_div(channels, kTileRows);
    const int64_t wanted = ceil_div(launch.threads, std::max<int64_t>(1, independent));
    const int64_t part = ceil_div(tiles, std::clamp<int64_t>(wanted, 1, tiles)) * kTileRows;
    const int64_t parts = ceil_div(channels, part);
#pragma omp parallel for num_threads(launch.threads) schedule(dynamic)
    for (int64_t job = 0; job < independent * parts; ++job) {
        const int64_t sample_group = job / parts, first = job % parts * part;
        worker.run(sample_group / geometry.groups, sample_group % geometry.groups, first,
                   std::min(channels, first + part));
    }
}

}  // namespace dpkernels::cpu
