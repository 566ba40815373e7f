/* For LD_PRELOAD: once a process has written QUOTA bytes to files, further writes fail with EDQUOT, as
   for a user who is over quota. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int over_quota(int file, size_t size) {
    static long written = 0;
    struct stat about;
    if (fstat(file, &about) != 0 || !S_ISREG(about.st_mode)) return 0;
    written += size;
    if (written <= atol(getenv("QUOTA"))) return 0;
    errno = EDQUOT;
    return 1;
}

ssize_t write(int file, const void *bytes, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    return over_quota(file, size) ? -1 : real(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    ssize_t (*real)(int, const struct iovec *, int) = dlsym(RTLD_NEXT, "writev");
    size_t size = 0;
    for (int part = 0; part < count; part++) size += parts[part].iov_len;
    return over_quota(file, size) ? -1 : real(file, parts, count);
}
