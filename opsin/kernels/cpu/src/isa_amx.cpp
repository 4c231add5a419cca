// The amx build; without the flags for it (another architecture) there is none.
#include "kernels.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define OPSIN_ISA isa_amx
#define OPSIN_ISA_NAME "amx"
#include "isa.h"

const opsin::Kernels* opsin::amx_kernels() { return &OPSIN_ISA::table; }
#else
const opsin::Kernels* opsin::amx_kernels() { return nullptr; }
#endif
