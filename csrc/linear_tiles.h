// Which tile of the product a block of linear.cu computes, by shape. Plain C++: the tests read it as well.
#pragma once

#include <cstdint>

namespace dinov2_fast {

// What follows x @ weight^T + bias.
enum class Form { none, gelu, swiglu, residual };

// A tile of `rows` x `columns`, whatever the dtype of the operands. In a ping-pong kernel two warp groups compute a
// tile each, and the epilogue of one runs while the tensor cores work for the other. In a cooperative one they share a
// tile, which may be larger, so that less is read from shared memory for each product, and the tensor cores wait for
// its epilogue.
struct Tile {
  int rows;
  int columns;
  bool pingpong;
};

// Best first where there is enough work.
constexpr Tile TILES[] = {{128, 256, false}, {128, 128, true}, {64, 128, true}};
constexpr int NUM_TILES = sizeof(TILES) / sizeof(Tile);

constexpr bool is_activation(Form form) { return form == Form::gelu || form == Form::swiglu; }

// Not overlapped, an activation would take a fifth (1536 in_features) to four fifths (384) of the time of the products,
// and twice that of e4m3 products. So it is always overlapped.
constexpr bool serves(const Tile& tile, Form form) { return tile.pingpong || !is_activation(form); }

constexpr int64_t tiles_in(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Index of the first tile that pads the columns no more than one of 128 would and of which every multiprocessor gets
// one; else of the last that serves the form.
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
