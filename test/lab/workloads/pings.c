// SPDX-License-Identifier: Apache-2.0
/* The subject of `pings` and `pings-epoll` in C, to be built in other ways than the one in Rust: without shared libraries,
 * against another C library, for 32 bits. Usage: PROGRAM BEHAVIOUR subject ADDRESS:PORT (IPv4). */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define GOODBYE (256 << 10)

static unsigned char bytes[GOODBYE + 4], answer[GOODBYE];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void say(const char *word)
{
	puts(word);
	fflush(stdout);
}

static void expect_line(const char *word)
{
	char line[64];
	size_t length = strlen(word);

	/* Byte by byte: poll must not miss what stdio has read ahead. */
	for (size_t at = 0; at <= length; at++)
		if (read(0, line + at, 1) != 1)
			fail("standard input");
	if (memcmp(line, word, length))
		fail("another line");
}

static void fill(unsigned char *to, uint64_t from, size_t length)
{
	for (size_t at = 0; at < length; at++)
		to[at] = ((from + at + 1) * UINT64_C(0x9e3779b97f4a7c15)) >> 56;
}

static void write_all(int fd, const void *from, size_t length)
{
	if (write(fd, from, length) != (ssize_t)length)
		fail("write");
}

/* With a set it waits in epoll_wait, which a stop would end with EINTR. */
static void read_all(int fd, int set, unsigned char *to, size_t length)
{
	for (size_t at = 0; at < length;) {
		struct epoll_event event;
		ssize_t n;

		if (set >= 0 && epoll_wait(set, &event, 1, -1) != 1)
			fail("epoll_wait");
		n = read(fd, to + at, length - at);
		if (n <= 0)
			fail("read");
		at += n;
	}
}

static void exchange(int fd, int set, uint64_t from, uint32_t length, int with_head)
{
	memcpy(bytes, &length, 4);
	fill(bytes + 4, from, length);
	write_all(fd, with_head ? bytes : bytes + 4, with_head ? length + 4 : length);
	read_all(fd, set, answer, length);
	if (memcmp(bytes + 4, answer, length))
		fail("another answer");
}

int main(int count, char **words)
{
	struct sockaddr_in there = { .sin_family = AF_INET };
	struct pollfd input = { .fd = 0, .events = POLLIN };
	struct epoll_event readable = { .events = EPOLLIN };
	int fd = socket(AF_INET, SOCK_STREAM, 0), set = -1;
	uint32_t number = 0, zero = 0;
	char *colon = count == 4 ? strrchr(words[3], ':') : NULL;

	if (!colon)
		fail("usage");
	*colon = 0;
	there.sin_port = htons(atoi(colon + 1));
	inet_pton(AF_INET, words[3], &there.sin_addr);
	if (connect(fd, (struct sockaddr *)&there, sizeof(there)))
		fail("connect");
	if (!strcmp(words[1], "pings-epoll")) {
		set = epoll_create1(0);
		if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &readable))
			fail("epoll_ctl");
	}
	say("connected");
	expect_line("enter");
	say("ready");
	for (; poll(&input, 1, 0) == 0; number++)
		exchange(fd, set, number, 1 + number * 7919 % 30000, 1);
	expect_line("leave");
	write_all(fd, &zero, 4);
	exchange(fd, set, 0, GOODBYE, 0);
	if (shutdown(fd, SHUT_WR))
		fail("shutdown");
	if (read(fd, answer, 1) != 0)
		fail("the end");
	say("ok");
	return 0;
}
