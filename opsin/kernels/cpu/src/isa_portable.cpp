// The build that runs on any machine.
#define OPSIN_ISA isa_portable
#define OPSIN_ISA_NAME "portable"
#undef __AVX2__
#undef __AVX512F__
#undef __ARM_NEON
#undef __ARM_FEATURE_DOTPROD
#include "isa.h"

const opsin::Kernels* opsin::portable_kernels() { return &OPSIN_ISA::table; }
