/* A disk that fails, as the environment says, for the process it is preloaded into:
   FAULT_CALL   flock, fsync (of files), fsync_directory, write, open, open_write, rename, read
   FAULT_ERRNO  the number that the call fails with
   FAULT_PATH   part of the paths it fails for; empty is all
   FAULT_AFTER  so many calls (bytes, for write) go well first
   FAULT_ONCE   a path: the fault happens once, to whoever first makes a directory of that name; unset is always */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long done; /* calls or bytes that went well; the order of threads does not matter here */

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

static int is_call(const char *call) {
  const char *wanted = getenv("FAULT_CALL");
  return wanted && !strcmp(wanted, call);
}

static int is_path(const char *path) {
  const char *part = getenv("FAULT_PATH");
  return path && (!part || strstr(path, part));
}

static int is_file(int file) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return is_path(path);
}

static long after(void) { return getenv("FAULT_AFTER") ? atol(getenv("FAULT_AFTER")) : 0; }

/* Whether the fault happens now, with errno set. */
static int happens(void) {
  const char *once = getenv("FAULT_ONCE");
  if (once && mkdir(once, 0700)) return 0;
  errno = getenv("FAULT_ERRNO") ? atoi(getenv("FAULT_ERRNO")) : EIO;
  return 1;
}

static int counted(void) { return __sync_fetch_and_add(&done, 1) >= after() && happens(); }

int flock(int file, int operation) {
  if (is_call("flock") && is_file(file) && counted()) return -1;
  return REAL("flock", int (*)(int, int))(file, operation);
}

static int syncing(int file) {
  struct stat state;
  int directory = !fstat(file, &state) && S_ISDIR(state.st_mode);
  return is_call(directory ? "fsync_directory" : "fsync") && is_file(file) && counted();
}

int fsync(int file) { return syncing(file) ? -1 : REAL("fsync", int (*)(int))(file); }
int fdatasync(int file) { return syncing(file) ? -1 : REAL("fdatasync", int (*)(int))(file); }

/* How many of `size` bytes may be written; -1 is none, with errno set. */
static ssize_t allowed(int file, size_t size) {
  if (!is_call("write") || !is_file(file)) return (ssize_t)size;
  long left = after() - __sync_fetch_and_add(&done, (long)size);
  if (left >= (long)size) return (ssize_t)size;
  if (left > 0) return left;
  return happens() ? -1 : (ssize_t)size;
}

ssize_t write(int file, const void *data, size_t size) {
  ssize_t count = allowed(file, size);
  return count < 0 ? -1 : REAL("write", ssize_t (*)(int, const void *, size_t))(file, data, (size_t)count);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  ssize_t count = allowed(file, size);
  return count < 0 ? -1 : REAL("pwrite64", ssize_t (*)(int, const void *, size_t, off64_t))(file, data, (size_t)count, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  size_t size = 0;
  for (int part = 0; part < count; part++) size += parts[part].iov_len;
  return allowed(file, size) < 0 ? -1 : REAL("writev", ssize_t (*)(int, const struct iovec *, int))(file, parts, count);
}

ssize_t read(int file, void *data, size_t size) {
  if (is_call("read") && is_file(file) && counted()) return -1;
  return REAL("read", ssize_t (*)(int, void *, size_t))(file, data, size);
}

ssize_t pread64(int file, void *data, size_t size, off64_t at) {
  if (is_call("read") && is_file(file) && counted()) return -1;
  return REAL("pread64", ssize_t (*)(int, void *, size_t, off64_t))(file, data, size, at);
}

static int opening(const char *path, int flags) {
  return is_call((flags & O_ACCMODE) == O_RDONLY ? "open" : "open_write") && is_path(path) && counted();
}

#define OPEN(name)                                            \
  int name(const char *path, int flags, ...) {                \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    mode_t mode = va_arg(rest, mode_t);                       \
    va_end(rest);                                             \
    if (opening(path, flags)) return -1;                      \
    return REAL(#name, int (*)(const char *, int, ...))(path, flags, mode); \
  }
#define OPENAT(name)                                          \
  int name(int directory, const char *path, int flags, ...) { \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    mode_t mode = va_arg(rest, mode_t);                       \
    va_end(rest);                                             \
    if (opening(path, flags)) return -1;                      \
    return REAL(#name, int (*)(int, const char *, int, ...))(directory, path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FILE *fopen64(const char *path, const char *mode) {
  if (opening(path, mode[0] == 'r' ? O_RDONLY : O_WRONLY)) return NULL;
  return REAL("fopen64", FILE *(*)(const char *, const char *))(path, mode);
}

int rename(const char *from, const char *to) {
  if (is_call("rename") && (is_path(from) || is_path(to)) && counted()) return -1;
  return REAL("rename", int (*)(const char *, const char *))(from, to);
}
