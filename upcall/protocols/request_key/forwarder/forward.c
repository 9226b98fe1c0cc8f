/* upcall-request-key: sends one key request of the kernel to the broker, and instantiates the key with the answer.
 *
 * /sbin/request-key starts it as root. Once it has the key's authority, it answers on every path: with the payload, or
 * with a rejection for one second. Without an answer the kernel would refuse the key for a minute. The kernel waits for
 * this program without a time-out, so a timer ends it in any case.
 *
 * Allocates no memory, reads no environment and no locale. standin.py does the same on machines without a compiler.
 */

#define _GNU_SOURCE
#include "decide.h"
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define NAME "upcall-request-key"
#define RELEASE "0.1.0"
#define USAGE "usage: " NAME " [-s SOCKET] [-t SECONDS] KEY\n"

enum { ANSWERED = 0, BAD_USAGE = 64, UNANSWERED = 70, NO_AUTHORITY = 77 }; /* as in sysexits.h */
enum { MAX_DESCRIBED = 4095 + 64, MAX_CALLOUT = 4095 };                  /* 64: type, uid, gid, permissions */
enum { REQUEST = 102, VERSION = 1, BEFORE_DATA = 24, REJECTED_FOR = 1 };   /* the last in seconds */
enum { FIRST_REAL_TIME = 32 };                                           /* a signal's number; libc reserves two */
static const char SERVICE[] = "request-key";
static const int64_t SECOND = 1000000000;

struct request { /* upcall/wire/envelope.py, and the body of the service */
	uint32_t length;
	uint16_t type, flags;
	uint32_t seq, netlink_pid, index, data_length;
	uint8_t version, name_length;
	uint16_t request_flags;
	uint32_t uid, pid;
	uint64_t deadline_ns;
	char name[sizeof SERVICE - 1];
	int32_t key, authorisation;
	uint16_t described_size, callout_size;
	char rest[MAX_DESCRIBED + 1 + MAX_CALLOUT + 1];
} __attribute__((packed));

/* All memory that may hold secrets, and the bytes of it in use. Only these are wiped before the program ends: touching
 * unused pages would cost more than everything else at the end. */
static struct {
	struct request request;
	uint8_t response[MAX_RESPONSE + 1];
} memory;
static size_t told, heard; /* bytes in use of request and response */

static int32_t key;
static const char *path = "/run/upcall/request-key.sock";
static int64_t deadline; /* CLOCK_MONOTONIC, ns */

/* --- ends --------------------------------------------------------------------------------------------------------- */

static void say(const char *text)
{
	if (write(STDERR_FILENO, text, strlen(text)) < 0)
		return; /* stderr may be closed */
}

_Noreturn static void end(int code, const char *text)
{
	say(text);
	_exit(code);
}

static const uint64_t ALL = ~UINT64_C(0), REAL_TIME = ~UINT64_C(0) << (FIRST_REAL_TIME - 1);

/* Blocks exactly these signals. Uses the system call, because libc never blocks the two that it reserves. */
static void hold(uint64_t signals)
{
	syscall(SYS_rt_sigprocmask, (long)SIG_SETMASK, &signals, NULL, sizeof signals);
}

static void wipe(void)
{
	explicit_bzero(&memory.request, told);
	explicit_bzero(memory.response, heard);
}

static void answer_rejection(int code)
{
	hold(ALL);
	wipe();
	if (reject(key, as_counted(REJECTED_FOR, gone_of_second()), rejectable(code)) < 0)
		end(UNANSWERED, NAME ": the key could not be rejected\n");
}

_Noreturn static void refuse(int code)
{
	answer_rejection(code);
	_exit(ANSWERED);
}

/* Rejects the key, logs, and ends. For faults that an administrator must fix and the broker cannot log. The answer goes
 * first and logging does not block: the kernel's caller waits for this program's end. */
_Noreturn static void refuse_and_log(int code, const char *why)
{
	answer_rejection(code);
	char line[256];
	int size = snprintf(line, sizeof line, "<83>" NAME "[%d]: key %d is rejected: %s (%s)", (int)getpid(), (int)key, why,
			    path); /* 83: LOG_AUTHPRIV, LOG_ERR */
	struct sockaddr_un log = {.sun_family = AF_UNIX};
	int out = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	strncpy(log.sun_path, log_path(), sizeof log.sun_path - 1);
	if (out >= 0 && size > 0)
		sendto(out, line, strnlen(line, sizeof line), MSG_DONTWAIT | MSG_NOSIGNAL, (struct sockaddr *)&log, sizeof log);
	_exit(ANSWERED);
}

static void on_signal(int number)
{
	bool fault = number == SIGSEGV || number == SIGBUS || number == SIGILL || number == SIGFPE || number == SIGSYS;
	refuse(number == SIGALRM ? ETIMEDOUT : fault ? EIO : ECANCELED);
}

/* --- the start ---------------------------------------------------------------------------------------------------- */

/* Parses a positive decimal number of at most `limit`, without sign, space or leading zero. 0 if malformed. */
static int32_t number_in(const char *text, int32_t limit)
{
	int64_t value = 0;
	if (*text == '0')
		return 0;
	for (; *text; text++) {
		if (*text < '0' || *text > '9')
			return 0;
		value = value * 10 + (*text - '0');
		if (value > limit)
			return 0;
	}
	return (int32_t)value;
}

static bool is_path(const char *text)
{
	return text[0] == '/' && strlen(text) < sizeof((struct sockaddr_un *)0)->sun_path;
}

/* Parses the arguments into `key` and `path`. Returns the seconds until the deadline. Ends the program if malformed. */
static int32_t take_arguments(int argc, char **argv)
{
	int32_t seconds = 10;
	for (int at = 1; at < argc; at++) {
		const char *word = argv[at], *value = at + 1 < argc ? argv[at + 1] : "";
		if (!strcmp(word, "--version") || !strcmp(word, "--help")) {
			const char *text = word[2] == 'v' ? NAME " " RELEASE "\n" : USAGE;
			_exit(write(STDOUT_FILENO, text, strlen(text)) < 0 ? UNANSWERED : 0);
		}
		if (!strcmp(word, "-s") && is_path(value)) {
			path = value;
			at++;
		} else if (!strcmp(word, "-t") && (seconds = number_in(value, 60))) {
			at++;
		} else if (key || !(key = number_in(word, INT32_MAX))) {
			end(BAD_USAGE, USAGE);
		}
	}
	if (!key)
		end(BAD_USAGE, USAGE);
	return seconds;
}

static int64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * SECOND + time.tv_nsec;
}

/* Opens descriptors 0 to 2 if they are closed, so that no socket gets their numbers, and closes all others. */
static void tidy_descriptors(void)
{
	int fd;
	do
		fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	while (fd >= 0 && fd <= STDERR_FILENO);
	syscall(SYS_close_range, 3U, ~0U, 0U);
}

static void harden(void)
{
	const struct rlimit none = {0, 0};
	setrlimit(RLIMIT_CORE, &none);
	prctl(PR_SET_DUMPABLE, 0L, 0L, 0L, 0L);
}

static bool is_harmless(int number)
{
	return number == SIGCHLD || number == SIGCONT || number == SIGURG || number == SIGWINCH;
}

/* Installs a handler that rejects the key, for every signal that would end or stop this program. Real-time signals stay
 * blocked. Call with all signals blocked. */
static void catch_signals(void)
{
	struct sigaction action = {.sa_handler = on_signal};
	sigfillset(&action.sa_mask);
	for (int number = 1; number < FIRST_REAL_TIME; number++)
		if (!is_harmless(number) && number != SIGKILL && number != SIGSTOP) /* cannot be caught */
			sigaction(number, &action, NULL);
}

static void start_timer(int32_t seconds)
{
	const struct itimerval once = {.it_value.tv_sec = seconds};
	if (setitimer(ITIMER_REAL, &once, NULL) < 0)
		refuse(errno);
}

/* --- the conversation --------------------------------------------------------------------------------------------- */

/* Packs the request for the broker into memory.request. Returns its size. Rejects the key on failure. */
static size_t pack_request(void)
{
	struct request *request = &memory.request;
	told = sizeof *request; /* until the size is known */
	long described = describe(key, request->rest, MAX_DESCRIBED + 1);
	if (described < 1)
		refuse(described < 0 ? errno : EIO);
	long auth = authorisation();
	if (auth < 0)
		refuse(errno);
	if (described > MAX_DESCRIBED + 1)
		refuse(EMSGSIZE);
	size_t described_size = (size_t)described - 1; /* without the NUL, which the callout overwrites */
	long callout = read_callout((uint8_t *)request->rest + described_size, MAX_CALLOUT + 1);
	if (callout < 0)
		refuse(errno);
	if (callout > MAX_CALLOUT)
		refuse(EMSGSIZE);
	size_t callout_size = (size_t)callout, size = offsetof(struct request, rest) + described_size + callout_size;
	told = size;
	request->length = (uint32_t)size;
	request->type = REQUEST;
	request->seq = (uint32_t)key;
	request->data_length = (uint32_t)(size - BEFORE_DATA);
	request->version = VERSION;
	request->name_length = sizeof request->name;
	request->pid = (uint32_t)getpid();
	request->deadline_ns = (uint64_t)deadline;
	memcpy(request->name, SERVICE, sizeof request->name);
	request->key = key;
	request->authorisation = (int32_t)auth;
	request->described_size = (uint16_t)described_size;
	request->callout_size = (uint16_t)callout_size;
	return size;
}

/* Sets the socket's time-out to the time until the deadline. Unlike poll(2), this also bounds connect(2) to a busy
 * broker. */
static void limit(int broker, int option)
{
	int64_t left = (deadline - now()) / 1000;
	if (left <= 0)
		refuse(ETIMEDOUT);
	const struct timeval time = {.tv_sec = left / 1000000, .tv_usec = left % 1000000};
	if (setsockopt(broker, SOL_SOCKET, option, &time, sizeof time) < 0)
		refuse(errno);
}

static int call_broker(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	int broker = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (broker < 0)
		refuse(errno);
	limit(broker, SO_SNDTIMEO);
	if (connect(broker, (struct sockaddr *)&address, sizeof address) < 0) {
		if (errno == EAGAIN)
			refuse_and_log(ETIMEDOUT, "the broker takes no connection");
		refuse_and_log(ENOTCONN, "no broker");
	}
	struct ucred peer = {.uid = (uid_t)-1};
	socklen_t size = sizeof peer;
	if (getsockopt(broker, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 || peer.uid != broker_uid())
		refuse_and_log(EPERM, "the socket is not root's");
	return broker;
}

_Noreturn static void refuse_talking(int code)
{
	if (code == EPIPE || code == ECONNRESET)
		refuse_and_log(ECONNRESET, "the broker hung up");
	refuse(code == EAGAIN ? ETIMEDOUT : code);
}

/* Sends the request of `size` bytes and receives the answer into memory.response. Returns the answer's size. Rejects
 * the key on failure. */
static size_t ask(size_t size)
{
	int broker = call_broker();
	limit(broker, SO_SNDTIMEO);
	if (send(broker, &memory.request, size, MSG_NOSIGNAL) < 0)
		refuse_talking(errno);
	limit(broker, SO_RCVTIMEO);
	heard = sizeof memory.response; /* until the size is known */
	ssize_t received = recv(broker, memory.response, sizeof memory.response, MSG_TRUNC);
	if (received <= 0)
		refuse_talking(received < 0 ? errno : ECONNRESET);
	if ((size_t)received > MAX_RESPONSE)
		refuse(EPROTO);
	heard = (size_t)received;
	return (size_t)received;
}

_Noreturn static void answer(size_t size)
{
	size_t described = memory.request.described_size;
	struct decision made = decide(memory.request.rest, described, (uint32_t)key, memory.response, size);
	if (made.refusal)
		refuse(made.refusal);
	hold(ALL); /* nothing blocks from here on, and a rejection after instantiating would come too late */
	/* Must be set before instantiating, which ends the authority. */
	if (made.expiry && set_timeout(key, as_counted(made.expiry, gone_of_second())) < 0)
		refuse(errno);
	if (instantiate(key, made.payload, made.size) < 0)
		refuse(EKEYREJECTED);
	wipe();
	_exit(ANSWERED);
}

int main(int argc, char **argv)
{
	int32_t seconds = take_arguments(argc, argv);
	deadline = now() + seconds * SECOND;
	tidy_descriptors();
	harden();
	hold(ALL);
	if (assume_authority(key) < 0)
		end(NO_AUTHORITY, NAME ": no authority over this key; the kernel starts this program\n");
	catch_signals();
	start_timer(seconds);
	hold(REAL_TIME);
	answer(ask(pack_request()));
}
