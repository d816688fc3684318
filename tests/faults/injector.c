/* Preloaded into every process of a build: makes chosen file calls below a folder fail, do half, or end the process.
 *
 * FAULT_ROOT     the folder, absolute and without links; other paths are left alone
 * FAULT_COUNTS   a file of 16 bytes outside that folder: calls and faults so far, of all processes of a build; each of
 *                them holds a shared lock on it
 * FAULT_LOG      a file outside that folder; without a fault it receives `number process call faults path` for each call,
 *                where faults is the set of errors that can come from it; else the same without faults for each that met
 *                the fault
 * FAULT_ERRNO    the error; 0: only count, -1: kill the process, -2: read or write half of what was asked for
 * FAULT_FIRST, FAULT_EACH, FAULT_TIMES
 *                of the calls that the error can come from, the first one from number FIRST on meets it, the first one
 *                from number FIRST + EACH on, and so on, TIMES times in all
 *
 * Errors come from calls that can have them: no ENOSPC of a read, no EMFILE of a rename.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = -1, HALF = -2 };

/* What a call does, for the errors that can come from it. */
enum {
    OPENS = 1,     /* takes a file descriptor */
    CREATES = 2,   /* makes a name */
    REMOVES = 4,   /* removes a name */
    READS = 8,     /* bytes of a file */
    WRITES = 16,   /* bytes of a file */
    FLUSHES = 32,  /* to the disk */
    CLOSES = 64,
    LOOKS = 128,   /* stat */
    RESIZES = 256,
    LOCKS = 512,
    CHANGES = 1024 /* opens for writing */
};

static char root[4096];
static size_t root_length;
/* Of all processes of a build: how many calls there were, and how many of them met the fault. */
static struct counts {
    long calls, faults;
} *counts;
static long first, each, times, error_number;
/* The first one is locked for as long as this process lives. */
static int counts_file = -1, log_file = -1;

/* Give a file a number that no program expects to be free. */
static int out_of_the_way(int file) {
    int moved = fcntl(file, F_DUPFD_CLOEXEC, 900);
    if (moved >= 0) syscall(SYS_close, file);
    return moved >= 0 ? moved : file;
}

/* Called when a program starts, and by a process that was forked from one that started without a folder. */
__attribute__((constructor)) void begin_faults(void) {
    const char *folder = getenv("FAULT_ROOT"), *shared = getenv("FAULT_COUNTS"), *log = getenv("FAULT_LOG");
    if (!folder || !shared || !log) return;
    int file = (int)syscall(SYS_openat, AT_FDCWD, shared, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) return;
    counts_file = out_of_the_way(file);
    syscall(SYS_flock, counts_file, LOCK_SH);
    log_file = out_of_the_way((int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644));
    first = atol(getenv("FAULT_FIRST"));
    each = atol(getenv("FAULT_EACH"));
    times = atol(getenv("FAULT_TIMES"));
    error_number = atol(getenv("FAULT_ERRNO"));
    root_length = strlen(folder);
    memcpy(root, folder, root_length + 1);
    counts = mapped;
}

static int can_come_from(long error, int kinds) {
    switch (error) {
    case HALF: return kinds & (READS | WRITES);
    case ENOSPC:
    case EDQUOT: return kinds & (CREATES | WRITES | FLUSHES | RESIZES | CLOSES);
    case EROFS: return kinds & (CREATES | REMOVES | CHANGES | RESIZES);
    case EMFILE:
    case ENFILE: return kinds & OPENS;
    case EINTR: return kinds & (OPENS | READS | WRITES | FLUSHES | CLOSES | LOCKS);
    default: return 1;
    }
}

static int is_below(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static void write_down(long number, const char *call, int kinds, const char *path) {
    static const struct {
        long error;
        const char *name;
    } all[] = {{KILL, "KILL"}, {HALF, "HALF"}, {EIO, "EIO"}, {ENOSPC, "ENOSPC"}, {EDQUOT, "EDQUOT"}, {EROFS, "EROFS"},
               {EMFILE, "EMFILE"}, {ENFILE, "ENFILE"}, {EINTR, "EINTR"}};
    char line[6000], faults[100] = "";
    for (size_t i = 0; !error_number && i < sizeof all / sizeof *all; i++)
        if (can_come_from(all[i].error, kinds)) strcat(strcat(faults, all[i].name), ",");
    int length = snprintf(line, sizeof line, "%ld %d %s %s%s%s\n", number, (int)getpid(), call, faults,
                          error_number ? "" : " ", path);
    if (length > 0) syscall(SYS_write, log_file, line, (size_t)length < sizeof line ? (size_t)length : sizeof line - 1);
}

/* Count a call, and return the error that it meets, 0 for none. */
static int count(const char *call, const char *path, int kinds) {
    long number = __atomic_add_fetch(&counts->calls, 1, __ATOMIC_SEQ_CST);
    if (!error_number) {
        write_down(number, call, kinds, path);
        return 0;
    }
    long before = __atomic_load_n(&counts->faults, __ATOMIC_SEQ_CST);
    if (before >= times || number < first + before * each || !can_come_from(error_number, kinds)) return 0;
    if (!__atomic_compare_exchange_n(&counts->faults, &before, before + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) return 0;
    write_down(number, call, kinds, path);
    if (error_number == KILL) syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    return (int)error_number;
}

static int of_descriptor(const char *call, int descriptor, int kinds) {
    if (!counts || descriptor == log_file) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return is_below(path) ? count(call, path, kinds) : 0;
}

static int of_path(const char *call, int folder, const char *path, int kinds) {
    if (!counts || !path) return 0;
    if (path[0] == 0) return of_descriptor(call, folder, kinds);
    if (path[0] == '/') return is_below(path) ? count(call, path, kinds) : 0;
    char link[64], whole[8192];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, whole, 4000);
    if (length <= 0) return 0;
    snprintf(whole + length, sizeof whole - (size_t)length, "/%s", path);
    return is_below(whole) ? count(call, whole, kinds) : 0;
}

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(fault, value) \
    do { \
        int met = (fault); \
        if (met > 0) { \
            errno = met; \
            return value; \
        } \
    } while (0)

static int kinds_of_open(int flags) {
    return OPENS | (flags & (O_CREAT | O_TMPFILE) ? CREATES : 0) | ((flags & O_ACCMODE) == O_RDONLY ? 0 : CHANGES);
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE(flags) \
        NEXT(name); \
        FAIL(of_path("open", AT_FDCWD, path, kinds_of_open(flags)), -1); \
        return next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        MODE(flags) \
        NEXT(name); \
        FAIL(of_path("open", folder, path, kinds_of_open(flags)), -1); \
        return next(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        NEXT(name); \
        FAIL(of_path("open", AT_FDCWD, path, kinds_of_open(mode[0] == 'r' ? O_RDONLY : O_WRONLY | O_CREAT)), NULL); \
        return next(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

DIR *opendir(const char *path) {
    NEXT(opendir);
    FAIL(of_path("opendir", AT_FDCWD, path, OPENS), NULL);
    return next(path);
}

#define READDIR(name, type) \
    struct type *name(DIR *folder) { \
        NEXT(name); \
        FAIL(of_descriptor("readdir", dirfd(folder), LOOKS), NULL); \
        return next(folder); \
    }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)

/* Half of a read or write is done, but at least one byte, so that it is never taken for the end of a file. */
#define TRANSFER(name, kind) \
    do { \
        int found = of_descriptor(name, descriptor, kind); \
        if (found > 0) { \
            errno = found; \
            return -1; \
        } \
        if (found == HALF && size > 1) size /= 2; \
    } while (0)

ssize_t read(int descriptor, void *data, size_t size) {
    NEXT(read);
    TRANSFER("read", READS);
    return next(descriptor, data, size);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    NEXT(write);
    TRANSFER("write", WRITES);
    return next(descriptor, data, size);
}

#define PREAD(name, offset_type) \
    ssize_t name(int descriptor, void *data, size_t size, offset_type offset) { \
        NEXT(name); \
        TRANSFER("read", READS); \
        return next(descriptor, data, size, offset); \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

#define PWRITE(name, offset_type) \
    ssize_t name(int descriptor, const void *data, size_t size, offset_type offset) { \
        NEXT(name); \
        TRANSFER("write", WRITES); \
        return next(descriptor, data, size, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define VECTOR(name, call, kind) \
    ssize_t name(int descriptor, const struct iovec *parts, int num_parts) { \
        NEXT(name); \
        int found = of_descriptor(call, descriptor, kind); \
        if (found > 0) { \
            errno = found; \
            return -1; \
        } \
        return next(descriptor, parts, found == HALF && num_parts > 1 ? num_parts / 2 : num_parts); \
    }
VECTOR(readv, "read", READS)
VECTOR(writev, "write", WRITES)

#define OF_DESCRIPTOR(name, kind) \
    int name(int descriptor) { \
        NEXT(name); \
        FAIL(of_descriptor(#name, descriptor, kind), -1); \
        return next(descriptor); \
    }
OF_DESCRIPTOR(fsync, FLUSHES)
OF_DESCRIPTOR(fdatasync, FLUSHES)

static int is_written(int descriptor) {
    int flags = fcntl(descriptor, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
}

/* A close that fails has closed all the same, on Linux. One of a file that was only read does not fail. */
int close(int descriptor) {
    NEXT(close);
    int found = is_written(descriptor) ? of_descriptor("close", descriptor, CLOSES) : 0;
    int code = next(descriptor);
    FAIL(found, -1);
    return code;
}

int flock(int descriptor, int operation) {
    NEXT(flock);
    FAIL(of_descriptor("flock", descriptor, LOCKS), -1);
    return next(descriptor, operation);
}

#define FTRUNCATE(name, type) \
    int name(int descriptor, type size) { \
        NEXT(name); \
        FAIL(of_descriptor("ftruncate", descriptor, RESIZES), -1); \
        return next(descriptor, size); \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

int rename(const char *from, const char *to) {
    NEXT(rename);
    FAIL(of_path("rename", AT_FDCWD, to, CREATES), -1);
    return next(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    NEXT(renameat);
    FAIL(of_path("rename", to_folder, to, CREATES), -1);
    return next(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    NEXT(renameat2);
    FAIL(of_path("rename", to_folder, to, CREATES), -1);
    return next(from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to) {
    NEXT(link);
    FAIL(of_path("link", AT_FDCWD, to, CREATES), -1);
    return next(from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    NEXT(linkat);
    FAIL(of_path("link", to_folder, to, CREATES), -1);
    return next(from_folder, from, to_folder, to, flags);
}

#define OF_PATH(name, kind) \
    int name(const char *path) { \
        NEXT(name); \
        FAIL(of_path(#name, AT_FDCWD, path, kind), -1); \
        return next(path); \
    }
OF_PATH(unlink, REMOVES)
OF_PATH(rmdir, REMOVES)

int unlinkat(int folder, const char *path, int flags) {
    NEXT(unlinkat);
    FAIL(of_path("unlink", folder, path, REMOVES), -1);
    return next(folder, path, flags);
}

int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    FAIL(of_path("mkdir", AT_FDCWD, path, CREATES), -1);
    return next(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    NEXT(mkdirat);
    FAIL(of_path("mkdir", folder, path, CREATES), -1);
    return next(folder, path, mode);
}

#define STAT(name, type) \
    int name(const char *path, struct type *found) { \
        NEXT(name); \
        FAIL(of_path("stat", AT_FDCWD, path, LOOKS), -1); \
        return next(path, found); \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

#define FSTAT(name, type) \
    int name(int descriptor, struct type *found) { \
        NEXT(name); \
        FAIL(of_descriptor("fstat", descriptor, LOOKS), -1); \
        return next(descriptor, found); \
    }
FSTAT(fstat, stat)
FSTAT(fstat64, stat64)

#define FSTATAT(name, type) \
    int name(int folder, const char *path, struct type *found, int flags) { \
        NEXT(name); \
        FAIL(of_path("stat", folder, path, LOOKS), -1); \
        return next(folder, path, found, flags); \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int statx(int folder, const char *path, int flags, unsigned mask, struct statx *found) {
    NEXT(statx);
    FAIL(of_path("stat", folder, path, LOOKS), -1);
    return next(folder, path, flags, mask, found);
}
