import java.io.*;
import java.nio.*;
import java.util.*;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.*;
import org.apache.hadoop.io.*;
import org.apache.hadoop.mapreduce.*;
import org.apache.hadoop.mapreduce.lib.input.*;
import org.apache.hadoop.mapreduce.lib.output.*;

/**
 * A gradient as a job of Hadoop's own MapReduce: mapreduce.py beside this file runs it.
 *
 * Hadoop cuts a file of records and gives each map task a part. The task feeds its records to a
 * process of Python and emits what that answers, a vector of float64. One reducer adds them up.
 * It prints, for each job, its seconds and how many vectors there were, one a map task.
 *
 *     GradientJob INPUT RECORD_BYTES SPLIT_BYTES OUTPUT JOBS COMMAND...
 */
public class GradientJob {
    public static class Map extends Mapper<LongWritable, BytesWritable, NullWritable, BytesWritable> {
        private Process process;

        @Override
        protected void setup(Context context) throws IOException {
            List<String> command = new ArrayList<>(
                Arrays.asList(context.getConfiguration().get("gradient.command").split("\n")));
            command.add(String.valueOf(context.getTaskAttemptID().getTaskID().getId()));
            process = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT).start();
        }

        @Override
        protected void map(LongWritable number, BytesWritable record, Context context) throws IOException {
            process.getOutputStream().write(record.getBytes(), 0, record.getLength());
        }

        @Override
        protected void cleanup(Context context) throws IOException, InterruptedException {
            process.getOutputStream().close();
            byte[] sums = process.getInputStream().readAllBytes();
            if (process.waitFor() != 0) throw new IOException("the mapper failed: see above");
            context.write(NullWritable.get(), new BytesWritable(sums));
        }
    }

    public static class Reduce extends Reducer<NullWritable, BytesWritable, NullWritable, BytesWritable> {
        @Override
        protected void reduce(NullWritable key, Iterable<BytesWritable> values, Context context)
                throws IOException, InterruptedException {
            double[] total = null;
            for (BytesWritable value : values) {
                DoubleBuffer x = doubles(value.copyBytes());
                if (total == null) total = new double[x.remaining()];
                for (int i = 0; i < total.length; i++) total[i] += x.get(i);
            }
            byte[] bytes = new byte[8 * total.length];
            doubles(bytes).put(total);
            context.write(key, new BytesWritable(bytes));
        }
    }

    static DoubleBuffer doubles(byte[] bytes) {
        return ByteBuffer.wrap(bytes).order(ByteOrder.LITTLE_ENDIAN).asDoubleBuffer();
    }

    public static void main(String[] args) throws Exception {
        Configuration conf = new Configuration();
        conf.setInt("mapreduce.local.map.tasks.maximum", 2);
        conf.setInt("mapreduce.client.completion.pollinterval", 10);  // ms; 5 s is Hadoop's default
        conf.setInt("mapreduce.client.progressmonitor.pollinterval", 10);
        conf.set(FixedLengthInputFormat.FIXED_RECORD_LENGTH, args[1]);
        conf.set(FileInputFormat.SPLIT_MAXSIZE, args[2]);
        conf.set("gradient.command",
            String.join("\n", Arrays.copyOfRange(args, 5, args.length)));
        Path output = new Path(args[3]);
        FileSystem files = output.getFileSystem(conf);
        for (int i = 0; i < Integer.parseInt(args[4]); i++) {
            long start = System.nanoTime();
            files.delete(output, true);
            Job job = Job.getInstance(conf, "gradient");
            job.setJarByClass(GradientJob.class);
            job.setMapperClass(Map.class);
            job.setReducerClass(Reduce.class);
            job.setInputFormatClass(FixedLengthInputFormat.class);
            job.setOutputFormatClass(SequenceFileOutputFormat.class);
            job.setOutputKeyClass(NullWritable.class);
            job.setOutputValueClass(BytesWritable.class);
            FileInputFormat.addInputPath(job, new Path(args[0]));
            FileOutputFormat.setOutputPath(job, output);
            if (!job.waitForCompletion(false)) System.exit(1);
            System.out.println((System.nanoTime() - start) / 1e9 + " "
                + job.getCounters().findCounter(TaskCounter.MAP_OUTPUT_RECORDS).getValue());
        }
        Path part = new Path(output, "part-r-00000");
        BytesWritable sums = new BytesWritable();
        try (SequenceFile.Reader in = new SequenceFile.Reader(conf, SequenceFile.Reader.file(part));
                OutputStream out = files.create(new Path(output, "sums"))) {
            in.next(NullWritable.get(), sums);
            out.write(sums.getBytes(), 0, sums.getLength());
        }
    }
}
