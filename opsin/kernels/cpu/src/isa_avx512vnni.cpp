// The avx512-vnni build; without the flags for it (another architecture) there is none.
#include "kernels.h"

#if defined(__AVX512VNNI__)
#define OPSIN_ISA isa_avx512vnni
#define OPSIN_ISA_NAME "avx512-vnni"
#include "isa.h"

const opsin::Kernels* opsin::avx512vnni_kernels() { return &OPSIN_ISA::table; }
#else
const opsin::Kernels* opsin::avx512vnni_kernels() { return nullptr; }
#endif
