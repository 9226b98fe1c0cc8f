/* Preloaded into servers of eCryptfs, so that they run without eCryptfs in the kernel, and without installing anything:
 *
 *   /dev/ecryptfs                 opening it duplicates the inherited descriptor BENCH_DEVICE
 *   libecryptfs's module folder   is read from the folder BENCH_KEY_MODULES instead
 *
 * Everything else is passed on. The environment is the benchmark's own.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char DEVICE[] = "/dev/ecryptfs", MODULES[] = "/usr/lib/x86_64-linux-gnu/ecryptfs";

static void *next(const char *name)
{
	void *found = dlsym(RTLD_NEXT, name);
	if (!found)
		abort();
	return found;
}

/* Returns a new descriptor for the device; -1 if there is none; -2 if `path` is another file. */
static int device(const char *path, int flags)
{
	const char *inherited = getenv("BENCH_DEVICE");
	if (!inherited || strcmp(path, DEVICE))
		return -2;
	return fcntl(atoi(inherited), flags & O_CLOEXEC ? F_DUPFD_CLOEXEC : F_DUPFD, 0);
}

#define OPEN(name)                                                                     \
	int name(const char *path, int flags, ...)                                     \
	{                                                                              \
		static int (*real)(const char *, int, ...);                            \
		unsigned mode = 0;                                                     \
		int fd = device(path, flags);                                          \
		if (fd != -2)                                                          \
			return fd;                                                     \
		if (!real)                                                             \
			real = (int (*)(const char *, int, ...))next(#name);           \
		if (flags & (O_CREAT | __O_TMPFILE)) {                                 \
			va_list more;                                                  \
			va_start(more, flags);                                         \
			mode = va_arg(more, unsigned);                                 \
			va_end(more);                                                  \
		}                                                                      \
		return real(path, flags, mode);                                        \
	}

OPEN(open)
OPEN(open64)

/* Returns the path of a key module, or of their folder, in `room`; other paths as they are; NULL if it is too long. */
static const char *moved(const char *path, char *room, size_t size)
{
	const char *folder = getenv("BENCH_KEY_MODULES");
	size_t length = sizeof MODULES - 1;
	if (!folder || !path || strncmp(path, MODULES, length) || (path[length] && path[length] != '/'))
		return path;
	int written = snprintf(room, size, "%s%s", folder, path + length);
	return written < 0 || (size_t)written >= size ? NULL : room;
}

DIR *opendir(const char *path)
{
	static DIR *(*real)(const char *);
	char room[4096];
	if (!real)
		real = (DIR * (*)(const char *)) next("opendir");
	path = moved(path, room, sizeof room);
	if (path)
		return real(path);
	errno = ENAMETOOLONG;
	return NULL;
}

void *dlopen(const char *path, int flags)
{
	static void *(*real)(const char *, int);
	char room[4096];
	const char *place = moved(path, room, sizeof room);
	if (!real)
		real = (void *(*)(const char *, int))next("dlopen");
	return place || !path ? real(place, flags) : NULL;
}
