// The avx512-bf16 build; without the flags for it (another architecture) there is none.
#include "kernels.h"

#if defined(__AVX512BF16__)
#define OPSIN_ISA isa_avx512bf16
#define OPSIN_ISA_NAME "avx512-bf16"
#include "isa.h"

const opsin::Kernels* opsin::avx512bf16_kernels() { return &OPSIN_ISA::table; }
#else
const opsin::Kernels* opsin::avx512bf16_kernels() { return nullptr; }
#endif
