/* Implements the messages of docs/protocol.md, and netlink with credentials on every message, for the C peers. */
#ifndef BENCH_WIRE_H
#define BENCH_WIRE_H

#define _GNU_SOURCE
#include <errno.h>
#include <linux/netlink.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { HELO = 100, QUIT, REQUEST, RESPONSE };
enum { VERSION = 1, MAX_NAME = 64, MAX_REASON = 64, SIGNATURE = 16, BUFFER = 66000 };

struct message {
	struct nlmsghdr header;
	uint32_t index, data_len;
};

struct request {
	struct message message;
	uint8_t version, name_len;
	uint16_t flags;
	uint32_t uid, pid;
	uint64_t deadline;
} __attribute__((packed));

struct response {
	struct message message;
	uint8_t version, status;
	uint16_t code;
} __attribute__((packed));

struct sender {
	struct ucred who; /* pid -1: unknown, because the message or its credentials were truncated */
	uint32_t portid;
};

static inline void die(const char *what)
{
	fprintf(stderr, "peer: %s: %s\n", what, strerror(errno));
	exit(1);
}

static inline uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static inline int netlink_open(void)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK};
	int on = 1, fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_USERSOCK);
	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on) ||
	    bind(fd, (struct sockaddr *)&address, sizeof address))
		die("netlink socket");
	return fd;
}

static inline uint32_t netlink_portid(int fd)
{
	struct sockaddr_nl address;
	socklen_t size = sizeof address;
	if (getsockname(fd, (struct sockaddr *)&address, &size))
		die("getsockname");
	return address.nl_pid;
}

static inline void netlink_connect(int fd, uint32_t portid)
{
	struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_pid = portid};
	if (connect(fd, (struct sockaddr *)&address, sizeof address))
		die("connect");
}

/* Parses the length of an eCryptfs packet and moves *at behind it. Returns (size_t)-1 if it is malformed. */
static inline size_t take_length(const uint8_t **at, const uint8_t *end)
{
	const uint8_t *p = *at;
	if (p < end && *p < 192) {
		*at = p + 1;
		return *p;
	}
	if (end - p < 2 || *p > 223)
		return (size_t)-1;
	*at = p + 2;
	return ((size_t)(p[0] - 192) << 8) + p[1] + 192;
}

static inline ssize_t netlink_take(int fd, void *data, struct sender *sender, int flags)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(struct ucred))];
	} ancillary;
	struct sockaddr_nl from;
	struct iovec part = {data, BUFFER};
	struct msghdr all = {.msg_name = &from, .msg_namelen = sizeof from, .msg_iov = &part, .msg_iovlen = 1,
			     .msg_control = &ancillary, .msg_controllen = sizeof ancillary};
	ssize_t size = recvmsg(fd, &all, flags);
	if (size < 0)
		return -1;
	struct cmsghdr *found = CMSG_FIRSTHDR(&all);
	sender->who = (struct ucred){.pid = -1, .uid = (uid_t)-1, .gid = (gid_t)-1};
	sender->portid = from.nl_pid;
	if (!(all.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) && found && found->cmsg_level == SOL_SOCKET &&
	    found->cmsg_type == SCM_CREDENTIALS && found->cmsg_len == CMSG_LEN(sizeof(struct ucred)))
		memcpy(&sender->who, CMSG_DATA(found), sizeof sender->who);
	return size;
}

static inline int control_send(int fd, uint16_t type)
{
	struct nlmsghdr header = {.nlmsg_len = sizeof header, .nlmsg_type = type};
	return send(fd, &header, sizeof header, 0) == sizeof header ? 0 : -1;
}

static inline int is_control(const void *data, ssize_t size, uint16_t type)
{
	const struct nlmsghdr *header = data;
	return size == sizeof *header && header->nlmsg_len == sizeof *header && header->nlmsg_type == type;
}

/* Parses a REQUEST that fills the buffer, as take_request() does: its lengths must be consistent. */
static inline int is_request(const void *data, ssize_t size)
{
	const struct request *request = data;
	if (size < (ssize_t)sizeof *request || request->message.header.nlmsg_type != REQUEST ||
	    request->message.header.nlmsg_len != (size_t)size ||
	    request->message.data_len != (size_t)size - sizeof request->message || request->version != VERSION ||
	    request->name_len < 1 || request->name_len > MAX_NAME ||
	    sizeof *request + request->name_len > (size_t)size)
		return 0;
	for (const uint8_t *name = (const uint8_t *)(request + 1), *end = name + request->name_len; name < end; name++)
		if (*name & 0x80)
			return 0;
	return 1;
}

static inline int is_response(const void *data, ssize_t size)
{
	const struct response *response = data;
	return size >= (ssize_t)sizeof *response && response->message.header.nlmsg_type == RESPONSE &&
	       response->message.header.nlmsg_len == (size_t)size &&
	       response->message.data_len == (size_t)size - sizeof response->message &&
	       response->version == VERSION && (!response->status || size <= (ssize_t)sizeof *response + MAX_REASON);
}

static inline int local_connect(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
		die(path);
	return fd;
}

static inline int local_listen(const char *folder, const char *name)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", folder, name);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 16))
		die(address.sun_path);
	return fd;
}

union two_descriptors {
	struct cmsghdr header;
	char room[CMSG_SPACE(2 * sizeof(int))];
};

/* Does what a broker does with a connection to registration.sock: reads HELO, makes both ends of a link, sends both and
 * keeps both open. Returns the broker's end; the other one stays open until this process ends. */
static inline int link_give(int connection)
{
	struct nlmsghdr helo;
	int ends[2] = {netlink_open(), netlink_open()};
	union two_descriptors ancillary = {.header = {.cmsg_len = CMSG_LEN(sizeof ends), .cmsg_level = SOL_SOCKET,
						      .cmsg_type = SCM_RIGHTS}};
	struct iovec part = {&helo, sizeof helo};
	struct msghdr all = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary,
			     .msg_controllen = sizeof ancillary};
	if (recv(connection, &helo, sizeof helo, 0) != sizeof helo || helo.nlmsg_type != HELO)
		die("HELO");
	netlink_connect(ends[0], netlink_portid(ends[1]));
	netlink_connect(ends[1], netlink_portid(ends[0]));
	memcpy(CMSG_DATA(&ancillary.header), ends, sizeof ends);
	if (sendmsg(connection, &all, 0) < 0)
		die("link");
	return ends[0];
}

static inline struct ucred local_peer(int fd)
{
	struct ucred who;
	socklen_t size = sizeof who;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size))
		die("SO_PEERCRED");
	return who;
}

/* Requests a link from the broker of FOLDER and sends HELO on it until it is answered. Returns the daemon's end. */
static inline int registered(const char *folder, struct sender *broker)
{
	static uint8_t data[BUFFER];
	struct nlmsghdr helo = {.nlmsg_len = sizeof helo, .nlmsg_type = HELO};
	struct timeval patience = {.tv_sec = 2}, forever = {0};
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	union two_descriptors ancillary;
	struct iovec part = {data, sizeof data};
	int ends[2];
	snprintf(address.sun_path, sizeof address.sun_path, "%s/registration.sock", folder);
	for (int tries = 0; tries < 100; tries++) {
		int connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
		struct msghdr all = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &ancillary,
				     .msg_controllen = sizeof ancillary};
		setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
		if (connect(connection, (struct sockaddr *)&address, sizeof address) ||
		    send(connection, &helo, sizeof helo, MSG_NOSIGNAL) < 0 ||
		    recvmsg(connection, &all, MSG_CMSG_CLOEXEC) <= 0 || !CMSG_FIRSTHDR(&all) ||
		    CMSG_FIRSTHDR(&all)->cmsg_len != CMSG_LEN(sizeof ends)) {
			close(connection);
			usleep(50000);
			continue;
		}
		broker->who = local_peer(connection);
		if (broker->who.uid != 0 && broker->who.uid != geteuid())
			die("a broker of another uid");
		memcpy(ends, CMSG_DATA(CMSG_FIRSTHDR(&all)), sizeof ends); /* both stay open, as the connection does */
		broker->portid = netlink_portid(ends[0]);
		setsockopt(ends[1], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
		struct sender sender;
		if (control_send(ends[1], HELO) || !is_control(data, netlink_take(ends[1], data, &sender, 0), HELO))
			die("HELO is not answered");
		setsockopt(ends[1], SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
		return ends[1];
	}
	errno = ETIMEDOUT;
	die("no broker answers");
	return -1;
}

extern volatile sig_atomic_t stopped; /* set by SIGTERM: flooding clients then print how much they sent */

int serve_as_daemon(const char *folder, int keyring);
int serve_as_broker(const char *folder);
int drive_daemon(const char *folder);
int drive_broker(const char *path, uint32_t uid);
int drive_device(int fd);

/* device.c */
enum { KERNEL_CONTEXTS = 32, MAX_PACKET = 531 };

/* What `parse` finds in an answer. `body` points into the received data. */
struct answer {
	uint32_t index, seq;
	int refused;
	const uint8_t *body;
	size_t size;
};

size_t pack_frame(uint8_t *out, uint32_t seq, uint32_t index, uint32_t uid, const void *body, size_t size);
int parse_frame(const uint8_t *data, ssize_t size, struct answer *answer);

/* quota.c */
int quota_send(void);
int quota_flood(const char *path, unsigned count, unsigned rate);
int quota_read(int protocol, uint32_t group, uint32_t sender);
int flood_with_junk(const char *folder, int registers);
int flood_with_requests(const char *path, uint32_t uid, const char *body);
int flood_with_connections(const char *path, int count, uint32_t uid, const char *body);

#endif
