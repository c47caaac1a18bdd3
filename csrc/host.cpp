#include "host.h"

namespace reprise {

Host* detail::g_host = nullptr;

void set_host(Host* host) noexcept { detail::g_host = host; }

}  // namespace reprise
