// SPDX-License-Identifier: Apache-2.0
// What system calls cost, in ns for each: the lowest of many short measurements, as whatever else the machine does only
// adds to it. Usage: calls getpid SECONDS | calls serve PORT | calls connect ADDRESS PORT SECONDS.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e9 + now.tv_nsec;
}

static struct sockaddr_in there = { .sin_family = AF_INET };

static void one_getpid(void)
{
	syscall(SYS_getpid);
}

/* The reset keeps TIME_WAIT from using up the ports. */
static void one_connect(void)
{
	struct linger reset = { .l_onoff = 1 };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (connect(fd, (struct sockaddr *)&there, sizeof(there)))
		fail("connect");
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	close(fd);
}

static void measure(void (*call)(void), int batch, double seconds)
{
	double end = now_ns() + seconds * 1e9, lowest = 1e18;

	while (now_ns() < end) {
		double start = now_ns();

		for (int count = 0; count < batch; count++)
			call();
		double each = (now_ns() - start) / batch;
		if (each < lowest)
			lowest = each;
	}
	printf("%.2f\n", lowest);
}

static void serve(int port)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(port) };
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&here, sizeof(here)) || listen(listener, 4096))
		fail("listen");
	for (;;)
		close(accept(listener, NULL, NULL));
}

int main(int count, char **words)
{
	if (count == 3 && !strcmp(words[1], "getpid")) {
		measure(one_getpid, 20000, atof(words[2]));
	} else if (count == 3 && !strcmp(words[1], "serve")) {
		serve(atoi(words[2]));
	} else if (count == 5 && !strcmp(words[1], "connect")) {
		inet_pton(AF_INET, words[2], &there.sin_addr);
		there.sin_port = htons(atoi(words[3]));
		measure(one_connect, 200, atof(words[4]));
	} else {
		fputs("usage: see calls.c\n", stderr);
		return 1;
	}
	return 0;
}
