/* The C peers of the benchmarks: a daemon, a broker, measuring clients and flooding ones.
 *
 *   peer daemon FOLDER [keyring]    registers with the broker of FOLDER; wraps by XOR 0x55
 *   peer broker FOLDER              a broker's hop, for one daemon
 *   peer drive-daemon FOLDER        simulates the broker for one daemon, and measures it (client.c)
 *   peer drive-broker SOCKET UID    a requester for the daemon of UID, and measures it (client.c)
 *   peer drive-device FD            plays fs/ecryptfs for what reads the other end of FD, and measures it (client.c)
 *   peer junk FOLDER                floods a broker with malformed messages
 *   peer ask SOCKET UID BODY        floods a broker with valid requests
 *   peer hold SOCKET UID COUNT [BODY]   holds COUNT connections; with a body, each makes requests and never reads
 *   peer quota-send                 quota warnings, as the kernel sends them (quota.c)
 *   peer quota-flood FILE N RATE    makes the kernel send quota warnings (quota.c)
 *   peer quota-read PROTOCOL GROUP SENDER   reads quota warnings (quota.c)
 *   peer burn                       uses processor time
 */
#include "wire.h"

#include <linux/keyctl.h>
#include <sys/syscall.h>

/* Makes the tag 67 packet for a tag 66 packet. Returns its size; 0 if that is malformed, or the keyring
 * does not have its key. */
static size_t wrap(const uint8_t *at, const uint8_t *end, uint8_t *out, int keyring)
{
	char signature[SIGNATURE + 1] = {0};
	if (at == end || *at++ != 66 || take_length(&at, end) != SIGNATURE || end - at < SIGNATURE)
		return 0;
	memcpy(signature, at, SIGNATURE);
	at += SIGNATURE;
	if (strspn(signature, "0123456789abcdef") != SIGNATURE)
		return 0;
	size_t size = take_length(&at, end);
	if (size != (size_t)(end - at) || size >= 192)
		return 0;
	if (keyring && syscall(SYS_keyctl, KEYCTL_SEARCH, KEY_SPEC_USER_KEYRING, "user", signature, 0) < 0)
		return 0;
	*out++ = 67;
	*out++ = 0;
	*out++ = (uint8_t)size;
	for (size_t i = 0; i < size; i++)
		out[i] = at[i] ^ 0x55;
	return 3 + size;
}

static ssize_t answer(const uint8_t *data, ssize_t size, uint8_t *out, int keyring)
{
	const struct request *request = (const void *)data;
	struct response *response = (void *)out;
	const uint8_t *body = data + sizeof *request + request->name_len;
	size_t got = 0;
	if (now() >= request->deadline)
		return 0; /* the request has timed out */
	if (request->name_len == 3 && !memcmp(request + 1, "key", 3))
		got = wrap(body, data + size, out + sizeof *response, keyring);
	*response = (struct response){.version = VERSION, .status = !got, .code = got ? 0 : EBADMSG};
	response->message.header.nlmsg_seq = request->message.header.nlmsg_seq;
	response->message.header.nlmsg_type = RESPONSE;
	response->message.index = request->message.index;
	size = (ssize_t)(sizeof *response + got);
	response->message.header.nlmsg_len = (uint32_t)size;
	response->message.data_len = (uint32_t)((size_t)size - sizeof response->message);
	return size;
}

int serve_as_daemon(const char *folder, int keyring)
{
	static uint8_t data[BUFFER], out[BUFFER];
	struct sender broker, sender;
	int fd = registered(folder, &broker);
	for (;;) {
		ssize_t size = netlink_take(fd, data, &sender, 0);
		if (size < 0)
			die("receive");
		if (sender.who.uid != broker.who.uid || sender.who.pid != broker.who.pid || sender.portid != broker.portid)
			continue;
		if (is_control(data, size, QUIT))
			return 0;
		if (!is_request(data, size))
			continue;
		size = answer(data, size, out, keyring);
		if (size && send(fd, out, (size_t)size, 0) < 0)
			die("send");
	}
}

volatile sig_atomic_t stopped;

static void stop(int number)
{
	(void)number;
	stopped = 1;
}

/* Sends malformed messages to registration.sock, each on a new connection, and as a registered daemon on the link. */
int flood_with_junk(const char *folder, int registers)
{
	struct sender broker;
	int link = registers ? registered(folder, &broker) : -1;
	char path[sizeof((struct sockaddr_un *)0)->sun_path];
	struct response junk = {.message.header = {.nlmsg_len = sizeof junk, .nlmsg_type = RESPONSE},
				.message.data_len = sizeof junk - sizeof junk.message, .version = VERSION};
	uint64_t count = 0;
	snprintf(path, sizeof path, "%s/registration.sock", folder);
	while (!stopped) {
		junk.message.header.nlmsg_seq++;
		junk.message.index = junk.message.header.nlmsg_seq % 64;
		if (link >= 0)
			count += send(link, &junk, sizeof junk, MSG_DONTWAIT) > 0;
		int stranger = local_connect(path);
		count += send(stranger, &junk, sizeof junk, MSG_DONTWAIT | MSG_NOSIGNAL) > 0;
		close(stranger);
	}
	printf("%llu\n", (unsigned long long)count);
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "", *where = argc > 2 ? argv[2] : "";
	uint32_t uid = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(what, "daemon"))
		return serve_as_daemon(where, argc > 3);
	if (!strcmp(what, "broker"))
		return serve_as_broker(where);
	if (!strcmp(what, "drive-daemon"))
		return drive_daemon(where);
	if (!strcmp(what, "drive-broker"))
		return drive_broker(where, uid);
	if (!strcmp(what, "drive-device") && argc > 2)
		return drive_device(atoi(where));
	if (!strcmp(what, "quota-send"))
		return quota_send();
	if (!strcmp(what, "quota-flood") && argc > 4)
		return quota_flood(where, uid, (unsigned)atoi(argv[4]));
	if (!strcmp(what, "quota-read") && argc > 4)
		return quota_read(atoi(where), uid, (uint32_t)strtoul(argv[4], NULL, 10));
	signal(SIGTERM, stop);
	if (!strcmp(what, "junk"))
		return flood_with_junk(where, argc < 4);
	if (!strcmp(what, "ask") && argc > 4)
		return flood_with_requests(where, uid, argv[4]);
	if (!strcmp(what, "hold") && argc > 4)
		return flood_with_connections(where, atoi(argv[4]) % 1024, uid, argc > 5 ? argv[5] : NULL);
	if (!strcmp(what, "burn"))
		while (!stopped)
			;
	return strcmp(what, "burn") ? 2 : 0;
}
