// Runs the NEON kernels and the portable ones on the same inputs in one process: every result must
// be the same bits, and where that is said near what plain double arithmetic gives.
//
// Without arguments it prints the instruction sets of this machine, best first; else it runs the
// cases named, or all of them for "all". Fails where any result differs.
#include "beside.h"

int main(int count, char** arguments) {
  using namespace beside;
  for (int i = 0; count == 1 && i < opsin_isa_count(); i++) std::puts(opsin_isa_name(i));
  const std::pair<const char*, void (*)()> cases[] = {
      {"products", products}, {"whole_numbers", whole_numbers},
      {"epilogues", epilogues}, {"filling", filling},
      {"rows_of_numbers", rows_of_numbers}, {"rotary", rotary},
      {"sampling", sampling}, {"rounding", rounding},
      {"attention", attention}, {"packed_attention", packed_attention},
      {"stacks", stacks},
  };
  for (int i = 1; i < count; i++) {
    bool known = false;
    for (const auto& [name, run] : cases) {
      if (std::strcmp(arguments[i], "all") && std::strcmp(arguments[i], name)) continue;
      known = true;
      const int64_t before = compared;
      run();
      std::printf("%s: %lld numbers\n", name, static_cast<long long>(compared - before));
    }
    if (!known) fail(arguments[i], "no such case");
  }
  return failures != 0;
}
