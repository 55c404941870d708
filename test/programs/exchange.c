// SPDX-License-Identifier: Apache-2.0
// An MPI program: rings, exchanges of all with all and sums, of random sizes, every word of which is known beforehand.
// Goes on until the input of rank 0 ends.

#include <mpi.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { LARGEST = 1 << 19 };

static int rank, ranks;

/* The word at `index` of what `from` sends to `to` in `round`. */
static uint32_t word(uint32_t round, int from, int to, int index)
{
	uint64_t mixed = ((uint64_t)round << 40 | (uint64_t)from << 32 | (uint64_t)to << 24) + (uint64_t)index;

	mixed *= 0x9e3779b97f4a7c15;
	return (uint32_t)(mixed >> 32);
}

static void expect(uint32_t round, const char *what, uint32_t received, uint32_t expected)
{
	if (received == expected)
		return;
	fprintf(stderr, "rank %d, round %u, %s: %08x, expected %08x\n", rank, round, what, received, expected);
	MPI_Abort(MPI_COMM_WORLD, 1);
}

static void ring(uint32_t round, int length, uint32_t *out, uint32_t *in)
{
	int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;

	for (int index = 0; index < length; index++)
		out[index] = word(round, rank, next, index);
	MPI_Sendrecv(out, length, MPI_UINT32_T, next, 0, in, length, MPI_UINT32_T, previous, 0, MPI_COMM_WORLD,
		     MPI_STATUS_IGNORE);
	for (int index = 0; index < length; index++)
		expect(round, "ring", in[index], word(round, previous, rank, index));
}

static void all_to_all(uint32_t round, int length, uint32_t *out, uint32_t *in)
{
	for (int to = 0; to < ranks; to++)
		for (int index = 0; index < length; index++)
			out[to * length + index] = word(round, rank, to, index);
	MPI_Alltoall(out, length, MPI_UINT32_T, in, length, MPI_UINT32_T, MPI_COMM_WORLD);
	for (int from = 0; from < ranks; from++)
		for (int index = 0; index < length; index++)
			expect(round, "all to all", in[from * length + index], word(round, from, rank, index));
}

static void sum(uint32_t round)
{
	uint32_t own = word(round, rank, 0, 0), total, expected = 0;

	MPI_Allreduce(&own, &total, 1, MPI_UINT32_T, MPI_SUM, MPI_COMM_WORLD);
	for (int from = 0; from < ranks; from++)
		expected += word(round, from, 0, 0);
	expect(round, "sum", total, expected);
}

static int input_has_ended(void)
{
	struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };
	char byte;

	return poll(&input, 1, 0) > 0 && read(STDIN_FILENO, &byte, 1) == 0;
}

int main(int argc, char **argv)
{
	uint32_t rounds = 0;
	int more = 1;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	uint32_t *out = malloc(sizeof(*out) * LARGEST * ranks);
	uint32_t *in = malloc(sizeof(*in) * LARGEST * ranks);

	for (; more; rounds++) {
		int length = 1 + word(rounds, 0, 0, 0) % (rounds % 16 ? 1000 : LARGEST);

		ring(rounds, length, out, in);
		all_to_all(rounds, length, out, in);
		sum(rounds);
		if (rank == 0)
			more = !input_has_ended();
		MPI_Bcast(&more, 1, MPI_INT, 0, MPI_COMM_WORLD);
	}
	if (rank == 0)
		printf("{\"ranks\": %d, \"rounds\": %u}\n", ranks, rounds);
	MPI_Finalize();
	return 0;
}
