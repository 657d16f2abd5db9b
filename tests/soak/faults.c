/* Makes the n-th system call of a kind fail, below one folder: see faults.py, which loads this
   ahead of libc and sets `soak_control`. The page is shared with the processes forked later. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, CREATE, READ, WRITE, STAT, SYNC, RENAME, UNLINK, MKDIR, ALLOCATE, LOCK, LIST, MAP, CLOSE, KINDS };
enum { KILL = -1, SHORT = -2 };

struct control {
    int armed, kind, error, lasting; /* error: an errno, KILL, or SHORT for half of the bytes */
    long from, hits, count[KINDS];
    char below[1024];
} *soak_control;

__attribute__((constructor)) static void begin(void) {
    soak_control = mmap(NULL, sizeof *soak_control, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })

static int ours(const char *path) { /* a relative path is one, as the program runs in the folder */
    int inside = path && (*path != '/' || !strncmp(path, soak_control->below, strlen(soak_control->below)));
    return soak_control->armed && inside && !strstr(path, "/.std");
}

static int ours_fd(int fd) {
    char link[32], path[1024];
    if (!soak_control->armed || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0 || *path != '/') return 0; /* a pipe, a socket */
    path[n] = 0;
    return ours(path);
}

static int fails(int kind) { /* whether the call is to fail, with errno; SHORT is for the caller */
    long n = __sync_add_and_fetch(&soak_control->count[kind], 1);
    if (soak_control->kind != kind || n < soak_control->from || (n > soak_control->from && !soak_control->lasting)) return 0;
    __sync_add_and_fetch(&soak_control->hits, 1);
    if (soak_control->error == KILL) kill(getpid(), SIGKILL);
    errno = soak_control->error;
    return 1;
}

#define FAIL(kind, is_ours, failed) do { int e = errno; if ((is_ours) && fails(kind)) return failed; errno = e; } while (0)
#define HALVE(kind, n) do { int e = errno; if (ours_fd(fd) && fails(kind)) { if (soak_control->error != SHORT) return -1; if (n > 1) n /= 2; } errno = e; } while (0)

static int opening(int flags) { return flags & (O_CREAT | O_WRONLY | O_RDWR) ? CREATE : OPEN; }
#define MODE(flags) mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define OPENS(name) int name(const char *path, int flags, ...) { MODE(flags) FAIL(opening(flags), ours(path), -1); return REAL(name)(path, flags, mode); }
#define OPENS_AT(name) int name(int at, const char *path, int flags, ...) { MODE(flags) FAIL(opening(flags), ours(path), -1); return REAL(name)(at, path, flags, mode); }
OPENS(open) OPENS(open64) OPENS_AT(openat) OPENS_AT(openat64)

ssize_t read(int fd, void *data, size_t n) { HALVE(READ, n); return REAL(read)(fd, data, n); }
ssize_t pread(int fd, void *data, size_t n, off_t at) { HALVE(READ, n); return REAL(pread)(fd, data, n, at); }
ssize_t pread64(int fd, void *data, size_t n, off64_t at) { HALVE(READ, n); return REAL(pread64)(fd, data, n, at); }
ssize_t write(int fd, const void *data, size_t n) { HALVE(WRITE, n); return REAL(write)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { HALVE(WRITE, n); return REAL(pwrite)(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { HALVE(WRITE, n); return REAL(pwrite64)(fd, data, n, at); }
ssize_t writev(int fd, const struct iovec *data, int n) { HALVE(WRITE, n); return REAL(writev)(fd, data, n); }

#define STATS(name, type) int name(const char *path, struct type *found) { FAIL(STAT, ours(path), -1); return REAL(name)(path, found); }
STATS(stat, stat) STATS(stat64, stat64) STATS(lstat, stat) STATS(lstat64, stat64)
int fstat(int fd, struct stat *found) { FAIL(STAT, ours_fd(fd), -1); return REAL(fstat)(fd, found); }
int fstat64(int fd, struct stat64 *found) { FAIL(STAT, ours_fd(fd), -1); return REAL(fstat64)(fd, found); }
int fstatat(int at, const char *path, struct stat *found, int flags) { FAIL(STAT, ours(path), -1); return REAL(fstatat)(at, path, found, flags); }
int fstatat64(int at, const char *path, struct stat64 *found, int flags) { FAIL(STAT, ours(path), -1); return REAL(fstatat64)(at, path, found, flags); }

int fsync(int fd) { FAIL(SYNC, ours_fd(fd), -1); return REAL(fsync)(fd); }
int fdatasync(int fd) { FAIL(SYNC, ours_fd(fd), -1); return REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) { FAIL(RENAME, ours(to), -1); return REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { FAIL(RENAME, ours(to), -1); return REAL(renameat)(a, from, b, to); }
int unlink(const char *path) { FAIL(UNLINK, ours(path), -1); return REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { FAIL(UNLINK, ours(path), -1); return REAL(unlinkat)(at, path, flags); }
int rmdir(const char *path) { FAIL(UNLINK, ours(path), -1); return REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { FAIL(MKDIR, ours(path), -1); return REAL(mkdir)(path, mode); }
int posix_fallocate(int fd, off_t at, off_t n) { FAIL(ALLOCATE, ours_fd(fd), errno); return REAL(posix_fallocate)(fd, at, n); }
int posix_fallocate64(int fd, off64_t at, off64_t n) { FAIL(ALLOCATE, ours_fd(fd), errno); return REAL(posix_fallocate64)(fd, at, n); }
int ftruncate(int fd, off_t n) { FAIL(ALLOCATE, ours_fd(fd), -1); return REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { FAIL(ALLOCATE, ours_fd(fd), -1); return REAL(ftruncate64)(fd, n); }
int flock(int fd, int how) { FAIL(LOCK, ours_fd(fd), -1); return REAL(flock)(fd, how); }
DIR *opendir(const char *path) { FAIL(LIST, ours(path), NULL); return REAL(opendir)(path); }
struct dirent *readdir(DIR *folder) { FAIL(LIST, ours_fd(dirfd(folder)), NULL); return REAL(readdir)(folder); }
struct dirent64 *readdir64(DIR *folder) { FAIL(LIST, ours_fd(dirfd(folder)), NULL); return REAL(readdir64)(folder); }
void *mmap(void *at, size_t n, int how, int flags, int fd, off_t from) { if (soak_control) FAIL(MAP, ours_fd(fd), MAP_FAILED); return REAL(mmap)(at, n, how, flags, fd, from); }
void *mmap64(void *at, size_t n, int how, int flags, int fd, off64_t from) { if (soak_control) FAIL(MAP, ours_fd(fd), MAP_FAILED); return REAL(mmap64)(at, n, how, flags, fd, from); }
int close(int fd) { int is_ours = ours_fd(fd), result = REAL(close)(fd); FAIL(CLOSE, is_ours, -1); return result; } /* closed all the same */
