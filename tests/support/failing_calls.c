/* Preloaded: system calls that some file systems lack fail in files below $FAIL_BELOW, each with the error number in the
   variable of its name, such as FAIL_FLOCK=38. FAIL_RENAME concerns renaming onto a file, FAIL_FSYNC_DIR folders. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int wanted(const char *name, const char *path) {
    const char *below = getenv("FAIL_BELOW"), *number = getenv(name);
    return number && below && path && !strncmp(path, below, strlen(below)) ? atoi(number) : 0;
}

static const char *path_of(int descriptor) {
    static __thread char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return NULL;
    path[length] = 0;
    return path;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(name, path) do { int number = wanted(name, path); if (number) { errno = number; return -1; } } while (0)

int flock(int descriptor, int operation) {
    FAIL("FAIL_FLOCK", path_of(descriptor));
    int (*next)(int, int) = dlsym(RTLD_NEXT, "flock");
    return next(descriptor, operation);
}

int fsync(int descriptor) {
    struct stat found;
    if (!fstat(descriptor, &found) && S_ISDIR(found.st_mode)) FAIL("FAIL_FSYNC_DIR", path_of(descriptor));
    return NEXT(fsync)(descriptor);
}

static int onto_a_file(const char *new) { return access(new, F_OK) == 0; }

int rename(const char *old, const char *new) {
    if (onto_a_file(new)) FAIL("FAIL_RENAME", new);
    return NEXT(rename)(old, new);
}

int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    if (onto_a_file(new)) FAIL("FAIL_RENAME", new);
    return NEXT(renameat)(old_folder, old, new_folder, new);
}

int link(const char *old, const char *new) {
    FAIL("FAIL_LINK", new);
    return NEXT(link)(old, new);
}

int linkat(int old_folder, const char *old, int new_folder, const char *new, int flags) {
    FAIL("FAIL_LINK", new);
    return NEXT(linkat)(old_folder, old, new_folder, new, flags);
}
