/* Simulates host.h: writes calls to the file `calls` in the folder $UPCALL_PLAY, and reads results from files there:
 * describe, callout, uid, gone, and fail-NAME with an errno for the call of that name. */

#define _GNU_SOURCE
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int open_at(const char *name, int flags)
{
	char path[4096];
	snprintf(path, sizeof path, "%s/%s", getenv("UPCALL_PLAY"), name);
	return open(path, flags | O_CLOEXEC, 0600);
}

/* Reads a file, truncated to `size`. Returns its whole length, or -1. Also works for a FIFO. */
static long read_file(const char *name, void *to, size_t size)
{
	static char content[65536];
	int fd = open_at(name, O_RDONLY);
	if (fd < 0)
		return -1;
	size_t length = 0;
	for (ssize_t got; (got = read(fd, content + length, sizeof content - length)) > 0;)
		length += (size_t)got;
	close(fd);
	memcpy(to, content, length < size ? length : size);
	return (long)length;
}

static void record(const char *format, ...)
{
	char line[256];
	va_list values;
	va_start(values, format);
	int size = vsnprintf(line, sizeof line, format, values);
	va_end(values);
	int fd = open_at("calls", O_WRONLY | O_APPEND | O_CREAT);
	if (size < 0 || write(fd, line, (size_t)size) != size)
		abort();
	close(fd);
}

static long outcome(const char *call)
{
	char name[64], code[16] = "";
	snprintf(name, sizeof name, "fail-%s", call);
	if (read_file(name, code, sizeof code - 1) < 0)
		return 0;
	errno = atoi(code);
	return -1;
}

long assume_authority(int32_t key)
{
	record("assume %d\n", key);
	return outcome("assume");
}

long describe(int32_t key, char *text, size_t size)
{
	record("describe %d\n", key);
	if (outcome("describe") < 0)
		return -1;
	long length = read_file("describe", text, size);
	if (length >= 0 && (size_t)length < size)
		text[length] = 0;
	return length + 1;
}

long authorisation(void)
{
	record("authorisation\n");
	return outcome("authorisation") < 0 ? -1 : 4242;
}

long read_callout(uint8_t *callout, size_t size)
{
	record("callout\n");
	return outcome("callout") < 0 ? -1 : read_file("callout", callout, size);
}

long set_timeout(int32_t key, uint32_t seconds)
{
	record("set_timeout %d %u\n", key, seconds);
	return outcome("set_timeout");
}

long instantiate(int32_t key, const uint8_t *payload, size_t size)
{
	record("instantiate %d ", key);
	for (size_t at = 0; at < size; at++)
		record("%02x", payload[at]);
	record("\n");
	return outcome("instantiate");
}

long reject(int32_t key, uint32_t seconds, int code)
{
	record("reject %d %u %d\n", key, seconds, code);
	return outcome("reject");
}

long gone_of_second(void)
{
	char gone[16] = "";
	read_file("gone", gone, sizeof gone - 1);
	return atol(gone);
}

uid_t broker_uid(void)
{
	char uid[16] = "";
	read_file("uid", uid, sizeof uid - 1);
	return (uid_t)strtoul(uid, NULL, 10);
}

const char *log_path(void)
{
	static char path[108];
	snprintf(path, sizeof path, "%s/log", getenv("UPCALL_PLAY"));
	return path;
}
