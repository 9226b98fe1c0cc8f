/* Quota warnings: sends them as the kernel does, makes the kernel send them, and reads them, for comparison. */
#include "wire.h"

#include <fcntl.h>
#include <linux/genetlink.h>

enum { QTYPE = 1, EXCESS_ID, WARNING, DEV_MAJOR, DEV_MINOR, CAUSED_ID, KINDS = 256 };

struct warning {
	struct nlmsghdr header;
	struct genlmsghdr generic;
	struct { struct nlattr a; uint32_t v; } qtype;
	struct { struct nlattr a; uint64_t v; } __attribute__((packed)) excess;
	struct { struct nlattr a; uint32_t v; } kind, major, minor;
	struct { struct nlattr a; uint64_t v; } __attribute__((packed)) cause;
} __attribute__((packed));

static void sleep_until(uint64_t when)
{
	struct timespec t = {.tv_sec = (time_t)(when / 1000000000), .tv_nsec = (long)(when % 1000000000)};
	clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

/* For each line "GROUP COUNT RATE", sends COUNT warnings of one uid to the group, ten at a time, then prints "done". */
int quota_send(void)
{
	struct sockaddr_nl to = {.nl_family = AF_NETLINK};
	struct warning warning = {
		.header = {.nlmsg_len = sizeof warning, .nlmsg_type = 28},
		.generic = {.cmd = 1, .version = 1},
		.qtype = {{8, QTYPE}, 0}, .excess = {{12, EXCESS_ID}, 5001}, .kind = {{8, WARNING}, 4},
		.major = {{8, DEV_MAJOR}, 7}, .minor = {{8, DEV_MINOR}, 0}, .cause = {{12, CAUSED_ID}, 5001},
	};
	int fd = netlink_open();
	unsigned group, count, rate, sequence[33] = {0};
	printf("ready %u\n", netlink_portid(fd));
	while (scanf("%u %u %u", &group, &count, &rate) == 3 && group - 1 < 32) {
		to.nl_groups = 1u << (group - 1);
		uint64_t start = now();
		for (unsigned sent = 0; sent < count; sent++) {
			if (sent % 10 == 0)
				sleep_until(start + (uint64_t)sent * 1000000000 / rate);
			warning.header.nlmsg_seq = ++sequence[group];
			sendto(fd, &warning, sizeof warning, 0, (struct sockaddr *)&to, sizeof to);
		}
		printf("done\n");
	}
	return 0;
}

/* Exceeds the soft limit and returns below it, by creating and removing a file: two warnings each time (ext4). */
int quota_flood(const char *path, unsigned count, unsigned rate)
{
	uint64_t start = now();
	for (unsigned made = 0; made < count; made++) {
		if (rate && made % 10 == 0)
			sleep_until(start + (uint64_t)made * 1000000000 / rate);
		int fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
		if (fd < 0)
			die(path);
		close(fd);
		unlink(path);
	}
	printf("%llu\n", (unsigned long long)(now() - start));
	return 0;
}

static const struct nlattr *attribute(const struct nlattr *at, const void *end, uint16_t *kind)
{
	size_t left = (size_t)((const char *)end - (const char *)at);
	if (left < sizeof *at || at->nla_len < sizeof *at || at->nla_len > left)
		return NULL;
	*kind = at->nla_type & NLA_TYPE_MASK;
	return (const struct nlattr *)((const char *)at + NLA_ALIGN(at->nla_len));
}

static volatile sig_atomic_t asked;

static void ask(int number)
{
	(void)number;
	asked = 1;
}

/* Reads, decodes and counts messages by uid and kind, one at a time; prints "RECEIVED LOST" at SIGUSR1. */
int quota_read(int protocol, uint32_t group, uint32_t sender)
{
	static struct { uint64_t who, what, times; } seen[KINDS];
	struct sockaddr_nl own = {.nl_family = AF_NETLINK}, from;
	int size = 16 << 20, fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, protocol);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) ||
	    bind(fd, (struct sockaddr *)&own, sizeof own) ||
	    setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group))
		die("quota reader");
	uint64_t received = 0;
	int64_t lost = 0;
	uint32_t next = 0;
	sigaction(SIGUSR1, &(struct sigaction){.sa_handler = ask}, NULL);
	printf("ready %d\n", (int)getpid());
	for (;;) {
		_Alignas(8) char data[4096];
		socklen_t length = sizeof from;
		ssize_t got = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&from, &length);
		const struct nlmsghdr *header = (const void *)data;
		if (asked) {
			asked = 0;
			printf("%llu %lld\n", (unsigned long long)received, (long long)lost);
		}
		if (got < (ssize_t)(NLMSG_HDRLEN + GENL_HDRLEN) || from.nl_pid != sender || header->nlmsg_len != (size_t)got)
			continue;
		uint64_t values[CAUSED_ID + 1] = {0};
		uint16_t kind;
		const char *end = data + got;
		const struct nlattr *at = (const void *)(data + NLMSG_HDRLEN + GENL_HDRLEN), *following;
		for (; (const char *)at < end && (following = attribute(at, end, &kind)); at = following) {
			size_t value = at->nla_len - sizeof *at;
			if (kind >= QTYPE && kind <= CAUSED_ID && value <= 8)
				memcpy(&values[kind], at + 1, value);
		}
		if (next)
			lost += (int32_t)(header->nlmsg_seq - next);
		next = header->nlmsg_seq + 1;
		received++;
		uint64_t who = values[EXCESS_ID] << 2 | values[QTYPE], what = values[WARNING] << 32 | values[DEV_MINOR];
		unsigned slot = (unsigned)((who * 31 + what) % KINDS);
		if (seen[slot].who != who || seen[slot].what != what)
			seen[slot] = (typeof(seen[0])){who, what, 0};
		seen[slot].times++;
	}
}
