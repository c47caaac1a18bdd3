#include "host.h"

#include <c10/util/Exception.h>

namespace reprise {
namespace {
Host* g_host = nullptr;
}

void set_host(Host* host) noexcept { g_host = host; }

Host& host() noexcept {
  TORCH_INTERNAL_ASSERT_DEBUG_ONLY(g_host != nullptr);
  return *g_host;
}

}  // namespace reprise
