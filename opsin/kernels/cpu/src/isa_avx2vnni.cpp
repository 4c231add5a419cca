// The avx2-vnni build; without the flags for it (another architecture) there is none.
#include "kernels.h"

#if defined(__AVXVNNI__)
#define OPSIN_ISA isa_avx2vnni
#define OPSIN_ISA_NAME "avx2-vnni"
#include "isa.h"

const opsin::Kernels* opsin::avx2vnni_kernels() { return &OPSIN_ISA::table; }
#else
const opsin::Kernels* opsin::avx2vnni_kernels() { return nullptr; }
#endif
