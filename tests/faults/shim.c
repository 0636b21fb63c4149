/* A disk that fails, for LD_PRELOAD: the SHIM_NTH call (from 1) of SHIM_CALL on a file under SHIM_UNDER fails with
 * SHIM_ERRNO, or writes half with SHIM_ERRNO=0; with SHIM_FOREVER=1 so does every one after it. The first failure makes
 * the file SHIM_TOLD. Calls: write, fsync, ftruncate, open. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_int calls;

static int is_under(const char *path)
{
    const char *under = getenv("SHIM_UNDER");
    return under && strncmp(path, under, strlen(under)) == 0;
}

/* Say whether this call of `name` is to fail. */
static int fails(const char *name, const char *path)
{
    const char *call = getenv("SHIM_CALL"), *told = getenv("SHIM_TOLD");
    int number, nth, descriptor;

    if (!call || !told || strcmp(call, name) != 0 || !is_under(path))
        return 0;
    number = atomic_fetch_add(&calls, 1) + 1;
    nth = atoi(getenv("SHIM_NTH"));
    if (number != nth && !(number > nth && strcmp(getenv("SHIM_FOREVER"), "1") == 0))
        return 0;
    descriptor = (int)syscall(SYS_openat, AT_FDCWD, told, O_WRONLY | O_CREAT, 0600);
    if (descriptor >= 0)
        syscall(SYS_close, descriptor);
    return 1;
}

static int fails_at(const char *name, int descriptor)
{
    char link[64], path[4096];
    ssize_t length;

    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = '\0';
    return fails(name, path);
}

static int error_number(void)
{
    return atoi(getenv("SHIM_ERRNO"));
}

ssize_t write(int descriptor, const void *data, size_t size)
{
    if (fails_at("write", descriptor)) {
        if (error_number()) {
            errno = error_number();
            return -1;
        }
        size /= 2;
    }
    return syscall(SYS_write, descriptor, data, size);
}

int fsync(int descriptor)
{
    if (fails_at("fsync", descriptor)) {
        errno = error_number();
        return -1;
    }
    return (int)syscall(SYS_fsync, descriptor);
}

int ftruncate64(int descriptor, off64_t size)
{
    if (fails_at("ftruncate", descriptor)) {
        errno = error_number();
        return -1;
    }
    return (int)syscall(SYS_ftruncate, descriptor, size);
}

int ftruncate(int descriptor, off_t size)
{
    return ftruncate64(descriptor, size);
}

static int open_or_fail(const char *path, int flags, int mode)
{
    if (fails("open", path)) {
        errno = error_number();
        return -1;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static int mode_of(int flags, va_list more)
{
    return flags & O_CREAT ? va_arg(more, int) : 0;
}

int open64(const char *path, int flags, ...)
{
    va_list more;
    int mode;

    va_start(more, flags);
    mode = mode_of(flags, more);
    va_end(more);
    return open_or_fail(path, flags, mode);
}

int open(const char *path, int flags, ...)
{
    va_list more;
    int mode;

    va_start(more, flags);
    mode = mode_of(flags, more);
    va_end(more);
    return open_or_fail(path, flags, mode);
}
