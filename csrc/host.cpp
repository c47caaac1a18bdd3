#include "host.h"

#include <cstdlib>

namespace reprise {

Host* detail::g_host = nullptr;

void set_host(Host* host) noexcept { detail::g_host = host; }

void throw_checkpoint_error(const std::string& message) {
  host().throw_checkpoint_error(message);
  std::abort();  // not reached; the compiler does not believe a virtual's noreturn
}

}  // namespace reprise
