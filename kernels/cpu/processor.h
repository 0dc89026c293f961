// What this processor has, where the compiler's own question does not know it everywhere: f16c and avxvnni are names to some
// compilers alone.
#pragma once
#if defined(EBBTIDE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(EBBTIDE_AARCH64) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(EBBTIDE_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace ebbtide {

#if defined(EBBTIDE_X86)
// Whether the system keeps AVX's registers is for __builtin_cpu_supports("avx2") to say.
inline bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
inline bool has_avxvnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
// Tiles of bytes, which Linux gives a process that asks for their registers; others are not asked.
inline bool has_amx() {
#if defined(__linux__)
    constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25;
    constexpr long ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (TILE | INT8)) != (TILE | INT8)) return false;
    static const bool given = syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0;
    return given;
#else
    return false;
#endif
}
#elif defined(EBBTIDE_AARCH64)
inline bool has_neon_dot() {
#if defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}
#endif

}  // namespace ebbtide
