// Leases: who holds what of which kind, and whether anybody did meanwhile.
#include "lease.h"

#include <optional>
#include <string>
#include <thread>

#include "check.h"

using reprise::Lease;

namespace {

constexpr auto kSettings = Lease::Kind::kSettings;
constexpr auto kBuffer = Lease::Kind::kBuffer;

std::string no_name(size_t) { return "it"; }

template <typename Ask>
auto on_another_thread(const Ask& ask) {
  decltype(ask()) answer{};
  std::thread([&] { answer = ask(); }).join();
  return answer;
}

TEST(a_kind_is_held_by_others_while_another_chain_holds_any_of_it) {
  const int key = 0;
  const auto settings = [] { return Lease::held_by_others(kSettings); };
  const auto buffer = [] { return Lease::held_by_others(kBuffer); };
  EXPECT(!on_another_thread(settings));
  {
    const Lease lease(kSettings, {&key}, no_name);
    EXPECT(on_another_thread(settings));
    EXPECT(!on_another_thread(buffer));
    EXPECT(!settings());  // this chain's own
    const int other = 0;
    const Lease second(kBuffer, {&other}, no_name);
    EXPECT(on_another_thread(buffer));
  }
  EXPECT(!on_another_thread(settings));
  EXPECT(!on_another_thread(buffer));
}

TEST(changes_tell_that_somebody_had_a_lease_and_gave_it_back) {
  // A replay reads the settings, and asks after that whether another one holds them. That one may
  // have put its own back in between.
  const int key = 0;
  const auto before = Lease::changes(kSettings);
  const auto of_buffers = Lease::changes(kBuffer);
  std::optional<Lease> lease(std::in_place, kSettings, Lease::Keys{&key}, no_name);
  const auto during = Lease::changes(kSettings);
  EXPECT(during != before);
  lease.reset();
  EXPECT(Lease::changes(kSettings) != during);
  EXPECT_EQ(Lease::changes(kBuffer), of_buffers);
}

TEST(a_key_that_a_chain_holds_already_is_not_given_back_by_the_inner_lease) {
  const int key = 0;
  const auto held = [] { return Lease::held_by_others(kBuffer); };
  const Lease outer(kBuffer, {&key}, no_name);
  {
    const Lease inner(kBuffer, {&key}, no_name);
  }
  EXPECT(on_another_thread(held));
}

}  // namespace

TEST_MAIN()
