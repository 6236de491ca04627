/* Let User Mode Linux 6.1 run on a processor with AMX, as a library for LD_PRELOAD.

It writes the registers of its processes with less room than AMX has, which the kernel refuses. So
the rest is read first, and written back with them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
    static long (*original)(enum __ptrace_request, ...);
    static char all[1 << 16] __attribute__((aligned(64)));
    va_list arguments;
    va_start(arguments, request);
    pid_t pid = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (!original)
        original = dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE) {
        struct iovec *some = data, whole = {all, sizeof all};
        long failed = original(PTRACE_GETREGSET, pid, address, &whole);
        if (!failed && whole.iov_len > some->iov_len) {
            memcpy(all, some->iov_base, some->iov_len);
            return original(request, pid, address, &whole);
        }
    }
    return original(request, pid, address, data);
}
