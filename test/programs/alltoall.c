// SPDX-License-Identifier: Apache-2.0
// How long MPI_Alltoall takes: median of small and of large exchanges. Usage: alltoall SECONDS. A second of each comes
// before what counts.

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

enum { SMALL = 64, LARGE = 64 << 10, MOST = 1 << 22 };

static int rank, ranks;

static int by_size(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* The median, in µs. Rank 0 looks at the clock for all. */
static double exchanges(char *out, char *in, int bytes, double *times, double seconds)
{
	double began = MPI_Wtime();
	int count = 0, more = 1;

	while (more) {
		double start = MPI_Wtime();

		MPI_Alltoall(out, bytes, MPI_CHAR, in, bytes, MPI_CHAR, MPI_COMM_WORLD);
		double end = MPI_Wtime();
		if (end - began > 1 && count < MOST)
			times[count++] = (end - start) * 1e6;
		more = end - began < 1 + seconds;
		MPI_Bcast(&more, 1, MPI_INT, 0, MPI_COMM_WORLD);
	}
	qsort(times, count, sizeof(*times), by_size);
	return times[count / 2];
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 4;

	MPI_Init(&argc, &argv);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &ranks);
	char *out = calloc(ranks, LARGE), *in = calloc(ranks, LARGE);
	double *times = malloc(sizeof(*times) * MOST);

	double small = exchanges(out, in, SMALL, times, seconds / 2);
	double large = exchanges(out, in, LARGE, times, seconds / 2);
	if (rank == 0)
		printf("{\"small_us\": %.2f, \"large_us\": %.2f}\n", small, large);
	MPI_Finalize();
	return 0;
}
