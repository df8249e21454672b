// The tiles of linear.cu, and which one serves a shape. Plain C++, because the tests compile it as well.
#pragma once

#include <cstdint>

namespace dinov2_fast {

// The epilogue after x @ weight^T + bias.
enum class Form { none, gelu, swiglu, residual };

// A tile of `rows` x `columns`, for operands of any dtype. In a ping-pong kernel, two warp groups compute a tile each,
// and the epilogue of one overlaps the products of the other. In a cooperative kernel, two warp groups share a tile,
// which can be larger. Each product then reads fewer bytes from shared memory, but the tensor cores wait for the
// epilogue.
struct Tile {
  int rows;
  int columns;
  bool pingpong;
};

// Best first, if there is enough work.
constexpr Tile TILES[] = {{128, 256, false}, {128, 128, true}, {64, 128, true}};
constexpr int NUM_TILES = sizeof(TILES) / sizeof(Tile);

constexpr bool is_activation(Form form) { return form == Form::gelu || form == Form::swiglu; }

// An activation is always overlapped. Otherwise it would add a fifth (1536 in_features) to four fifths (384) to the
// time of the products, and twice as much to the time of e4m3 products.
constexpr bool serves(const Tile& tile, Form form) { return tile.pingpong || !is_activation(form); }

constexpr int64_t tiles_in(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// The index of the first tile that serves the form, pads the columns no more than a tile of 128 columns would, and
// gives every multiprocessor a tile. If there is none, the index of the last tile that serves the form.
constexpr int choose_tile(int64_t rows, int64_t out_features, Form form, int multiprocessors) {
  int choice = -1;
  for (int i = 0; i < NUM_TILES; ++i) {
    const Tile& tile = TILES[i];
    if (!serves(tile, form)) continue;
    choice = i;
    const int64_t across = tiles_in(out_features, tile.columns);
    const bool pads_little = across * tile.columns <= tiles_in(out_features, 128) * 128;
    if (pads_little && tiles_in(rows, tile.rows) * across >= multiprocessors) break;
  }
  return choice;
}

}  // namespace dinov2_fast
