#include "scratch.h"

#include <cstdlib>
#include <new>
#include <vector>

namespace minidl {
namespace {

constexpr std::size_t kAlign = 64;       // a cache line, and the widest vector
constexpr std::size_t kKeep = 64 << 20;  // larger blocks go back to the system at once
constexpr std::size_t kBlocks = 16;      // how many idle blocks a thread keeps

struct alignas(kAlign) Header {  // in front of every block
  std::size_t bytes;
};

struct Cache {
  std::vector<Header*> idle;
  ~Cache() {
    for (Header* block : idle) std::free(block);
  }
};
thread_local Cache cache;

}  // namespace

void* take_scratch(std::size_t bytes) {
  std::vector<Header*>& idle = cache.idle;
  std::size_t best = idle.size();  // the smallest idle block that is large enough
  for (std::size_t i = 0; i < idle.size(); ++i) {
    if (idle[i]->bytes >= bytes && (best == idle.size() || idle[i]->bytes < idle[best]->bytes)) {
      best = i;
    }
  }
  if (best < idle.size()) {
    Header* block = idle[best];
    idle[best] = idle.back();
    idle.pop_back();
    return block + 1;
  }
  const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
  if (rounded < bytes) throw std::bad_alloc();
  idle.reserve(kBlocks);  // so that giving back cannot fail
  void* memory = std::aligned_alloc(kAlign, rounded + sizeof(Header));
  if (!memory) throw std::bad_alloc();
  auto* block = static_cast<Header*>(memory);
  block->bytes = rounded;
  return block + 1;
}

void give_back_scratch(void* memory) noexcept {
  Header* block = static_cast<Header*>(memory) - 1;
  std::vector<Header*>& idle = cache.idle;
  if (block->bytes > kKeep) {
    std::free(block);
    return;
  }
  if (idle.size() == kBlocks) {  // make room: drop the smallest, it is the cheapest to get again
    std::size_t smallest = 0;
    for (std::size_t i = 1; i < idle.size(); ++i) {
      if (idle[i]->bytes < idle[smallest]->bytes) smallest = i;
    }
    if (idle[smallest]->bytes >= block->bytes) {
      std::free(block);
      return;
    }
    std::free(idle[smallest]);
    idle[smallest] = idle.back();
    idle.pop_back();
  }
  idle.push_back(block);
}

}  // namespace minidl
