/* A minimal safe broker in C: requesters' socket -> one daemon's netlink socket -> back.
 *
 * It has what every broker needs (credentials on every message, message contexts with index and sequence number, a
 * dedicated socket for the daemon). It has no deadlines, checks of answers' packets, replacement of daemons or status.
 */
#include "wire.h"

#include <sys/epoll.h>

enum { CONTEXTS = 64, EVENTS = 16 };

static struct {
	int connection; /* -1: free */
	uint32_t counter, seq, index;
} contexts[CONTEXTS];

static int epoll, link_fd = -1;
static uint32_t counter;
static struct sender owner; /* of link_fd */

static void watch(int fd)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static void on_daemon(int registration)
{
	int connection = accept4(registration, NULL, NULL, SOCK_CLOEXEC);
	if (connection < 0 || link_fd >= 0)
		return;
	link_fd = link_give(connection);
	watch(link_fd);
}

static void on_hello(const void *data, ssize_t size, const struct sender *sender)
{
	if (!is_control(data, size, HELO) || sender->who.pid < 0)
		return;
	owner = *sender;
	if (control_send(link_fd, HELO))
		die("HELO");
}

static void refuse(int connection, const struct request *request, uint16_t code)
{
	struct response out = {.version = VERSION, .status = 1, .code = code};
	out.message.header = request->message.header;
	out.message.header.nlmsg_type = RESPONSE;
	out.message.header.nlmsg_len = sizeof out;
	out.message.index = request->message.index;
	out.message.data_len = sizeof out - sizeof out.message;
	send(connection, &out, sizeof out, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void on_request(int connection)
{
	static uint8_t data[BUFFER];
	struct request *request = (void *)data;
	ssize_t size = recv(connection, data, sizeof data, MSG_DONTWAIT | MSG_TRUNC);
	if (size < 0)
		return;
	if (size > (ssize_t)sizeof data || !is_request(data, size)) {
		for (int i = 0; i < CONTEXTS; i++)
			if (contexts[i].connection == connection)
				contexts[i].connection = -1;
		close(connection);
		return;
	}
	struct ucred who = local_peer(connection);
	uint32_t slot = 0;
	while (slot < CONTEXTS && contexts[slot].connection >= 0)
		slot++;
	if (!owner.who.pid || request->uid != owner.who.uid || (who.uid && who.uid != request->uid) || slot == CONTEXTS) {
		refuse(connection, request, slot == CONTEXTS ? ENOMEM : EPERM);
		return;
	}
	contexts[slot].connection = connection;
	contexts[slot].counter = ++counter;
	contexts[slot].seq = request->message.header.nlmsg_seq;
	contexts[slot].index = request->message.index;
	request->message.header.nlmsg_seq = counter;
	request->message.index = slot;
	request->uid = who.uid;
	request->pid = (uint32_t)who.pid;
	if (send(link_fd, data, (size_t)size, MSG_DONTWAIT) < 0) {
		contexts[slot].connection = -1;
		refuse(connection, request, EAGAIN);
	}
}

static void on_response(void)
{
	static uint8_t data[BUFFER];
	struct response *response = (void *)data;
	struct sender sender;
	ssize_t size = netlink_take(link_fd, data, &sender, MSG_DONTWAIT);
	uint32_t slot = response->message.index;
	if (!owner.who.pid) {
		on_hello(data, size, &sender);
		return;
	}
	if (size < 0 || sender.who.uid != owner.who.uid || sender.who.pid != owner.who.pid ||
	    !is_response(data, size) || slot >= CONTEXTS || contexts[slot].connection < 0 ||
	    contexts[slot].counter != response->message.header.nlmsg_seq)
		return;
	response->message.header.nlmsg_seq = contexts[slot].seq;
	response->message.index = contexts[slot].index;
	send(contexts[slot].connection, data, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL);
	contexts[slot].connection = -1;
}

int serve_as_broker(const char *folder)
{
	struct epoll_event events[EVENTS];
	int listener = local_listen(folder, "broker.sock"), registration = local_listen(folder, "registration.sock");
	for (int i = 0; i < CONTEXTS; i++)
		contexts[i].connection = -1;
	epoll = epoll_create1(EPOLL_CLOEXEC);
	watch(listener);
	watch(registration);
	for (;;) {
		int ready = epoll_wait(epoll, events, EVENTS, -1);
		for (int i = 0; i < ready; i++) {
			int fd = events[i].data.fd;
			if (fd == listener)
				watch(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
			else if (fd == registration)
				on_daemon(registration);
			else if (fd == link_fd)
				on_response();
			else
				on_request(fd);
		}
	}
}
