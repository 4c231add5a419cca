// The neon build; without the flags for it (another architecture) there is none.
#include "kernels.h"

#if defined(__ARM_NEON)
#define OPSIN_ISA isa_neon
#define OPSIN_ISA_NAME "neon"
#include "isa.h"

const opsin::Kernels* opsin::neon_kernels() { return &OPSIN_ISA::table; }
#else
const opsin::Kernels* opsin::neon_kernels() { return nullptr; }
#endif
