// The avx512 build; without the flags for it (another architecture) there is none.
#include "kernels.h"

#if defined(__AVX512BW__)
#define OPSIN_ISA isa_avx512
#define OPSIN_ISA_NAME "avx512"
#include "isa.h"

const opsin::Kernels* opsin::avx512_kernels() { return &OPSIN_ISA::table; }
#else
const opsin::Kernels* opsin::avx512_kernels() { return nullptr; }
#endif
