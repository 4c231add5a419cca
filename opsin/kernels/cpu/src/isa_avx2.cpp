// The avx2 build; without the flags for it (another architecture) there is none.
#include "kernels.h"

#if defined(__AVX2__)
#define OPSIN_ISA isa_avx2
#define OPSIN_ISA_NAME "avx2"
#include "isa.h"

const opsin::Kernels* opsin::avx2_kernels() { return &OPSIN_ISA::table; }
#else
const opsin::Kernels* opsin::avx2_kernels() { return nullptr; }
#endif
